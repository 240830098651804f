"""Online DPO with a LoRA adapter: a fraction of the memory of training all weights.

Command:   python -m halos_jax.main --config=configs/lora.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  x
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "online"
    config.workdir = "runs/lora"
    config.lora.rank = 64
    config.lora.dropout = 0.0
    config.optimizer.learning_rate = 2e-5
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.eval_every = 8
    return config
