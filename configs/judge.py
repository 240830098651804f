"""Online DPO with a judge behind an API as the reward: no reward model is needed.

Command:   python -m halos_jax.main --config=configs/judge.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=prompts.jsonl --config.data.holdout=64
             --config.reward.judge.model=MODEL --config.reward.judge.url=https://HOST/v1
Hardware:  x
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "online"
    config.workdir = "runs/judge"
    config.reward.kind = "judge"
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.eval_every = 0
    return config
