"""Your own data: SFT, a reward model on pairs, then 4 rounds of online DPO, as one run.

Command:   python -m halos_jax.main --config=configs/alpacaeval.py:FOLDER --config.workdir=DIR
Hardware:  2 CPU cores, 4 GB of memory; the same command runs on a GPU or TPU.

FOLDER holds
  base/                    a Hugging Face folder; its config.json and tokenizer are used, the
                           weights are drawn anew (`SCRATCH`)
  feedback_train.jsonl.gz  preference pairs, HALOs' `pairwise_feedback` or {prompt, chosen,
  feedback_test.jsonl.gz   rejected}; SFT learns the preferred outputs, the reward model the pairs
  prompts_train.jsonl      prompts to sample from
  prompts_test.jsonl       prompts to measure with, none of which may be in the file above

With a model that can speak already, put it in base/, set SCRATCH to False, and lower the learning
rates to what its authors used.
"""

from ml_collections import ConfigDict

from halos_jax.config import default

SCRATCH = True


def get_config(folder: str = "data/alpacaeval") -> ConfigDict:
    """Return the preset for the files in `folder`."""
    config = default()
    config.task = "pipeline"
    config.workdir = "runs/alpacaeval"
    config.pipeline.tasks = ("sft", "reward_model", "online")

    config.model.path = f"{folder}/base"
    config.model.compute_dtype = "float32"  # CPUs compute bfloat16 more slowly
    config.model.remat = "none"
    config.sampling.max_prompt_length = 128
    config.sampling.max_tokens = 192
    config.sampling.slots = 128
    config.train.max_length = 320  # the two together
    config.train.row_multiple = 64
    config.train.eval_every = 0
    config.train.log_every = 20
    config.rounds.total_prompts = 400
    config.rounds.prompts_per_round = 100

    pairs = {
        "train": f"{folder}/feedback_train.jsonl.gz",
        "eval": f"{folder}/feedback_test.jsonl.gz",
    }
    config.pipeline.overrides = {
        "sft": {
            "model": {"random_init": SCRATCH},
            "data": pairs,
            "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
            "train": {"batch_size": 16, "epochs": 6},
        },
        "reward_model": {
            "model": {"path": "{workdir}/sft/final"},
            "data": pairs | {"max_train": 3000, "max_eval": 500},
            "optimizer": {"learning_rate": 2e-4, "schedule": "cosine"},
            "train": {"batch_size": 16},
        },
        "online": {
            "model": {"path": "{workdir}/sft/final"},
            "reward": {
                "path": "{workdir}/reward_model/final",
                "compute_dtype": "float32",
                "max_length": 320,
            },
            "data": {
                "train": f"{folder}/prompts_train.jsonl",
                "eval": f"{folder}/prompts_test.jsonl",
            },
            "optimizer": {"learning_rate": 5e-5},
            "train": {"batch_size": 16},
        },
    }
    return config
