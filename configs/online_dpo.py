"""Online DPO on your own SFT checkpoint and reward model: HALOs' defaults.

Command:   python -m halos_jax.main --config=configs/online_dpo.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.eval=held_out.jsonl
Hardware:  whatever holds the policy with its optimizer and the reward model. Split them over more
           devices with --config.mesh.fsdp=-1 --config.mesh.data=1.

4 rounds of 512 prompts x 4 samples; the best and the worst sample of a prompt make a pair.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset: the defaults, with sampling lengths that fit train.max_length."""
    config = default()
    config.task = "online"
    config.workdir = "runs/online_dpo"
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.eval_every = 8
    return config
