"""Online DPO with a LoRA adapter: the optimizer holds a few per cent of the weights.

Command:   python -m halos_jax.main --config=configs/lora.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  whatever holds the policy in bfloat16 twice (the base, and the sampler's weights with the
           adapter in them) and the reward model: see halos_jax/guide/MEMORY.md. With
           --config.lora.base=nf4 the base takes 0.6 bytes a weight.
Expect:    `reward_eval` rises as with all weights (configs/online_dpo.py). final/ has the merged
           model, final/adapter/ the adapter in PEFT's format.
Measured:  nothing yet.

Change first: the rate (--config.optimizer.learning_rate): an adapter takes ten times that of all
weights, and it goes with lora.alpha, which is 4 x rank unless it is set. Then --config.lora.rank.
Other tasks with an adapter: --config=configs/sft.py or configs/align.py with
--config.lora.rank=64 and the rate that their docstrings name.
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
