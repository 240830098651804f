"""Supervised fine-tuning of all weights on demonstrations, with a rate that suits it.

Command:   python -m halos_jax.main --config=configs/sft.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=conversations.jsonl --config.data.holdout=256
Hardware:  one GPU of 80 GB for models of up to 1.5B parameters; split larger ones over more devices
           with --config.mesh.fsdp=-1 --config.mesh.data=1. A CPU does for a trial.
Expect:    `loss/eval`, nats a token of the held-out demonstrations, falls most in the first tens of
           steps. Where it rises again, the rate or the number of epochs is too high.
Measured:  SmolLM2-135M-Instruct (dequantised from 4 bits) on 64 of GSM8K's shorter questions and
           answers, 8 steps of 8, 32 others held out; 2 CPU cores beside other work, jax 0.10.2,
           2026-11-26 (model.compute_dtype=float32, model.remat=none, train.batch_size=8):
             rate                2e-6             1e-5   2e-5, 4 of the 8 steps
             loss/eval  1.546 -> 1.436   1.546 -> 1.245           1.546 -> 1.223

Not measured on a GPU. Change first: the rate (--config.optimizer.learning_rate), up to 2e-5 for
less than 1B parameters and down to 5e-6 for 8B. Then --config.train.epochs. With an adapter
(--config.lora.rank=64) begin with 2e-4. (These three are published recipes', not measured here.)
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
