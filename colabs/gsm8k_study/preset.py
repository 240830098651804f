"""The study's preset: what its runs have in common. `FOLDER` holds the model and the questions.

Command:   python -m halos_jax.main --config=colabs/gsm8k_study/preset.py:FOLDER
             --config.workdir=DIR --config.optimizer.learning_rate=2e-6
             --config.rounds.prompts_per_round=128
Hardware:  a quarter of a GPU of 80 GB for a model of 0.5B parameters.

FOLDER/model is a model in Hugging Face format, FOLDER/train.jsonl and FOLDER/test.jsonl are GSM8K's
questions, a record `{"question", "answer"}` each.

A run uses 2,048 questions, 4 samples of each. It is watched on 400 training questions that nothing
is trained on, 4 samples of each, and scored on the 1,319 test questions, greedily, at its start and
its end alone. The warm-up is counted in steps, so that it is the same for every number of rounds.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from halos_jax.config import default

HELD_OUT = 400
# Method -> fields of it.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
    "kto": {
        "loss": {"name": "kto", "beta": 0.1},
        "feedback": {"type": "binary", "threshold": "median"},
    },
    "dapo": {
        "loss": {"name": "dapo"},
        "feedback": {"type": "scalar"},
        "sampling": {"num_samples_per_prompt": 8, "temperature": 1.0, "keep_logps": True},
        "optimizer": {"weight_decay": 0.0},
    },
}


def get_config(argument: str = "data/gsm8k") -> ConfigDict:
    """Return a run on the questions in a folder, 16 rounds of 128.

    Args:
      argument: the folder; or the folder, a comma and a method: "DIR,kto". Without it, online DPO.
    """
    folder, _, method = argument.partition(",")
    config = default()
    config.task = "online"
    config.workdir = "runs/gsm8k_study"
    config.progress = False
    config.model.path = f"{folder}/model"
    config.model.head_chunk = 2048  # several runs share a GPU
    config.data.train = f"{folder}/train.jsonl"
    config.data.holdout = HELD_OUT
    config.data.test = f"{folder}/test.jsonl"
    config.eval.test_temperature = 0.0
    config.reward.kind = "function"
    config.reward.function = "halos_jax.rewards.functions:numeric_answer"
    config.rounds.total_prompts = 2048
    config.rounds.watch_samples = 512
    config.rounds.prompts_per_round = 128
    config.rounds.keep_best = False  # final/ has the last round, unless a run is about the best one
    config.sampling.num_samples_per_prompt = 4
    config.sampling.temperature = 0.8
    config.sampling.top_p = 1.0
    config.sampling.max_prompt_length = 256
    config.sampling.max_tokens = 320
    config.sampling.slots = 512
    config.sampling.shard_prompts = 512
    config.optimizer.learning_rate = 2e-6
    config.optimizer.warmup_steps = 6
    config.train.batch_size = 32
    config.train.max_length = 576
    config.train.eval_every = 0
    config.train.log_every = 1000
    for section, fields in METHODS[method or "dpo"].items():
        if section == "loss":
            config.loss = ConfigDict(fields)
        else:
            config[section].update(fields)
    return config
