"""Offline alignment on a file of preferences: DPO, or KTO.

Command:   python -m halos_jax.main --config=configs/align.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=pairs.jsonl --config.data.holdout=256
           with --config=configs/align.py:kto for KTO
Hardware:  x
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
