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
Measured:  Qwen2.5-0.5B on GSM8K, rank 64, alpha 256, rate 2e-5, 4 rounds of 256 questions x 4
           (temperature 0.8, 320 tokens, `numeric_answer`), 400 held-out questions x 4, one seed:
           17.7 +- 2.7 % right, 25.4 after 2 rounds, 30.6 +- 3.5 after 4, at a KL of 4.8 nats a
           response; 343 s of one H100 80GB that two other runs shared, jax 0.11.2, 2026-11-26.
           On the quickstart's task and SFT model (303,744 parameters,
           --config=quickstart), scored by the rule (reward.kind=function), rank 16, temperature 1;
           right answers to 128 held-out prompts x 4, KL from the SFT policy in nats a response, one
           seed; 2 CPU cores beside other work, jax 0.10.2, 2026-11-26:
             round                     0      1      2      3      4
             right, %, at 1e-4      50.8   61.7   70.1   75.8   83.4
             KL of its samples                0.00   0.03   0.13   0.15
             right, %, at 5e-4      50.8   76.2   58.0   81.6   83.2
             KL of its samples                0.00   0.34   8.43   0.49
           For all weights this task takes 5e-5: twice that was steady for the adapter, ten times
           was not. The preset has ten times the rate of all weights on GSM8K (2e-6).

Change first: the rate (--config.optimizer.learning_rate). It goes with lora.alpha, the factor of
the adapter, which is 4 x rank unless it is set; PEFT's users often set alpha to the rank or twice
that, and then take a higher rate. Then --config.lora.rank.
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
    config.lora.dropout = 0.0  # HALOs' 0.05 makes log-ratios noisy
    config.optimizer.learning_rate = 2e-5
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.eval_every = 8
    return config
