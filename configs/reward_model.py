"""A reward model, trained on your own pairs of a better and a worse answer.

Command:   python -m halos_jax.main --config=configs/reward_model.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=pairs.jsonl --config.data.holdout=256
Hardware:  one GPU of 80 GB for models of up to 1.5B parameters; split larger ones over more devices
           with --config.mesh.fsdp=-1 --config.mesh.data=1.
Expect:    `rewards_eval/accuracies`, the share of held-out pairs whose better answer scores higher,
           rises from 0.5: the score head is drawn anew. `loss/eval` begins near ln 2 = 0.69.
Measured:  SmolLM2-135M-Instruct (dequantised from 4 bits) on 64 of AlpacaEval's shorter pairs, 8
           steps of 8, 48 other pairs held out, which are too few to tell a rate by; 2 CPU cores
           beside other work, 15 minutes, jax 0.10.2, 2026-11-26 (model.compute_dtype=float32,
           model.remat=none, train.batch_size=8):
             loss/eval  0.681 -> 0.667      accuracy of held-out pairs  0.58 -> 0.60

Not measured on a GPU. Change first: the rate (--config.optimizer.learning_rate), down to 5e-6 for
models of 8B parameters, and 1e-4 with an adapter (--config.lora.rank=64); both are published
recipes', not measured here. More than one epoch learns the pairs by heart. Start from
the SFT checkpoint of the policy, so that both have one tokenizer and template.
--config.loss.margin=1 uses the rewards in the records, --config.loss.center_coefficient=0.01 keeps
scores near 0.
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
