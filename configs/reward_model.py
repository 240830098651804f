"""A reward model, trained on your own pairs of a better and a worse answer.

Command:   python -m halos_jax.main --config=configs/reward_model.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=pairs.jsonl --config.data.holdout=256
Hardware:  x
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "reward_model"
    config.workdir = "runs/reward_model"
    config.loss.name = "bradley-terry"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.train.batch_size = 32  # pairs
    config.train.max_length = 2048
    config.train.eval_every = 50
    config.train.log_every = 10
    return config
