"""The benchmark: training steps, scoring, sampling and a whole round, on random weights.

Command:   python -m halos_jax.main --config=configs/bench.py:case=NAME
           NAME is a case of halos_jax/bench/workloads.py, several with commas, `all`, or `tiny`
           (all of them at a size for a CPU).
Hardware:  one GPU of 80 GB for the 1B cases, of 141 GB for the 8B ones; `tiny` runs on a CPU.
Time:      half a minute a case, half of it compilation, and a minute and a half for a round; all of
           them 8 minutes on one H200. `tiny` a minute and a half in all on a CPU.
Result:    a line of JSON a case on the console, and in workdir/bench.jsonl. For the figures of
           one H200 see halos_jax/bench/README.md.

Weights and Adam's moments are bfloat16, as in the frameworks this is compared with. For float32
master weights and moments add
  --config.model.params_dtype=float32 --config.optimizer.moments_dtype=float32
and for another number of examples of a step, or of prompts, --config.bench.examples=8.
`peak_gib` is the process's: run a case alone to know its own.
"""

from ml_collections import ConfigDict

from halos_jax.bench.workloads import CASES
from halos_jax.config import default


def get_config(argument: str = "case=tiny") -> ConfigDict:
    """Return the preset for "case=NAME[,NAME...]"."""
    name = argument.removeprefix("case=")
    config = default()
    config.task = "bench"
    config.workdir = "runs/bench"
    config.progress = False
    config.model.params_dtype = "bfloat16"
    config.optimizer.moments_dtype = "bfloat16"
    config.train.log_every = 1000
    config.train.tokens_per_device = 65536
    config.sampling.slots = 256
    config.sampling.shard_prompts = 512
    config.bench.cases = tuple(CASES) if name in ("all", "tiny") else tuple(name.split(","))
    config.bench.tiny = name == "tiny"
    if config.bench.tiny:
        config.bench.steps = 2
        config.model.compute_dtype = config.reward.compute_dtype = "float32"
        config.train.row_multiple = 64
        config.train.batch_size = 4
        config.sampling.slots = 16
        config.sampling.chunk = 8
    return config
