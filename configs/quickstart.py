"""The whole loop on a toy task, from nothing, on two CPU cores.

Command:   bash launch/quickstart.sh
           (or, installed: python -m halos_jax.main --config=configs/quickstart.py)
Hardware:  2 CPU cores, 2 GB of memory; runs the same on a GPU or TPU.
Time:      1 to 4 minutes (2 CPU cores), installation aside.
Result:    right answers on held-out prompts, by round: 51, 67, 77, 83, 86 %.

The task is to sort letters ("dbca" -> "abcd"). The stages: make tokenizer, prompts and
demonstrations, a share of which is wrong on purpose; train a small Llama on the demonstrations
(SFT); train a reward model on pairs; then 4 rounds of online DPO of 512 prompts x 4 samples. The
SFT model has learnt the mistakes with the task. The rounds take them out: the held-out reward
rises, by the reward model and by the rule (is the answer exactly the sorted letters?).
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "pipeline"
    config.workdir = "runs/quickstart"
    config.pipeline.tasks = ("toy_data", "sft", "reward_model", "online")

    config.model.path = "{workdir}/toy_data/base"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.train.max_length = 24
    config.train.row_multiple = 8
    config.train.eval_every = 0
    config.train.log_every = 50
    config.sampling.max_prompt_length = 12
    config.sampling.max_tokens = 10
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.slots = 512
    config.sampling.chunk = 5
    config.rounds.total_prompts = 2048
    config.rounds.prompts_per_round = 512
    config.toy.num_sft = 12000
    config.toy.num_pairs = 8000

    fast = {"learning_rate": 2e-3, "schedule": "cosine", "weight_decay": 0.01}
    from_scratch = {"path": "{workdir}/toy_data/base", "random_init": True}
    config.pipeline.overrides = {
        "sft": {
            "model": from_scratch,
            "data": {
                "train": "{workdir}/toy_data/sft.jsonl",
                "eval": "{workdir}/toy_data/eval.jsonl",
            },
            "optimizer": fast,
            "train": {"batch_size": 128, "epochs": 3},
        },
        "reward_model": {
            "model": from_scratch,
            "data": {
                "train": "{workdir}/toy_data/pairs.jsonl",
                "eval": "{workdir}/toy_data/eval_pairs.jsonl",
            },
            "optimizer": fast,
            "train": {"batch_size": 128, "epochs": 2},
        },
        "online": {
            "model": {"path": "{workdir}/sft/final"},
            "reward": {
                "path": "{workdir}/reward_model/final",
                "compute_dtype": "float32",
                "max_length": 24,
                "rules": ("halos_jax.data.toy:score_by_rule",),
            },
            "data": {
                "train": "{workdir}/toy_data/prompts.jsonl",
                "eval": "{workdir}/toy_data/eval.jsonl",
            },
            "optimizer": {"learning_rate": 5e-5},
            "train": {"batch_size": 32},
        },
    }
    return config
