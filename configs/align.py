"""Offline alignment of all weights on a file of preferences: DPO, or KTO.

Command:   python -m halos_jax.main --config=configs/align.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=pairs.jsonl --config.data.holdout=256
           and for KTO, on pairs or on single answers with a `label`,
           python -m halos_jax.main --config=configs/align.py:kto --config.workdir=runs/OTHER
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=pairs.jsonl --config.data.holdout=256
Hardware:  one GPU of 80 GB for models of up to 1.5B parameters; split larger ones over more devices
           with --config.mesh.fsdp=-1 --config.mesh.data=1. The reference's log-probabilities are
           computed once at the start, so it takes no memory afterwards.
Expect:    `rewards_eval/accuracies`, 0 while policy and reference are one, rises above 0.5;
           `loss/eval` of DPO falls from ln 2 = 0.693. Neither says that answers become better:
           sample and score the result (task=eval).
Measured:  not on a GPU. DPO on 2,048 pairs of the quickstart's task, its SFT model (303,744
           parameters) and rate, 5e-5; 128 other pairs held out, one seed, 2 CPU cores beside other
           work, jax 0.10.2, 2026-11-26:
             step                         0     50     64
             loss/eval                0.693  0.393  0.344
             rewards_eval/accuracies   0.00   0.94   0.93
             logps_eval/chosen        -0.66  -0.97  -1.25
           The better answers became less likely as well, if less so than the worse ones (-6.4 to
           -18.3). On pairs of the policy's own samples, online runs of one round of 2,048
           questions of GSM8K at 1e-6, 2e-6, 3e-6 and 5e-6 went from about 17 % right answers to
           23.2, 26.2, 23.3 and 7.8 % (0.5B; means of 1, 3, 3 and 1 seeds; halos_jax/course has the
           table). KTO's rate, 5e-7, is that of configs/online_kto.py, which has a curve.

Change first: the rate (--config.optimizer.learning_rate), by the number of steps: half of it for
twice the steps. With an adapter (--config.lora.rank=64) take 1e-5. Another loss is
--config.loss.name=ipo; --help=losses lists them.
"""

from ml_collections import ConfigDict

from halos_jax.config import default

RATES = {"dpo": 2e-6, "kto": 5e-7}


def get_config(loss: str = "dpo") -> ConfigDict:
    """Return the preset for the loss "dpo" or "kto"."""
    if loss not in RATES:
        raise ValueError(f"got {loss!r}, allowed: {', '.join(RATES)}")
    config = default()
    config.task = "align"
    config.workdir = "runs/align"
    config.loss.name = loss  # beta 0.1
    config.optimizer.learning_rate = RATES[loss]
    config.train.batch_size = 32
    config.train.max_length = 2048
    config.train.eval_every = 50
    config.train.log_every = 10
    return config
