"""Supervised fine-tuning of all weights on your own demonstrations.

Command:   python -m halos_jax.main --config=configs/sft.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=conversations.jsonl --config.data.holdout=256
Hardware:  x
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "sft"
    config.workdir = "runs/sft"
    config.loss.name = "sft"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.train.batch_size = 32  # conversations
    config.train.max_length = 2048
    config.train.eval_every = 50
    config.train.log_every = 10
    return config
