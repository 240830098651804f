"""Online PPO with a value head, on your own SFT checkpoint and reward model.

Command:   python -m halos_jax.main --config=configs/ppo.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  whatever holds the policy with its optimizer and the reward model: one GPU of 80 GB for
           models of up to 1.5B parameters with a reward model of that size.
Expect:    `reward_eval` rises; `clipfrac/policy` stays below a few per cent.
Measured:  the quickstart's task on its SFT model (303,744 parameters; --config=quickstart), scored
           by the rule (reward.kind=function), its lengths, rate 1e-4; right answers to 128
           held-out prompts x 4, one seed; 2 CPU cores beside other work, 2.5 minutes, jax 0.10.2,
           2026-11-26:
             round         0     2     4     8    12    16
             right, %   50.8  67.2  80.5  89.6  93.6  95.9
           On a GPU only a run that was cut, with loss.lam=0.95: a 0.5B model on GSM8K's questions
           (fields of configs/gsm8k.py) from 14.4 ±2.3 to 17.4 ±2.6 % right answers to 400 held-out
           questions x 4 in 4 rounds, at a KL of 0.6 nats a response, which is not beyond noise; a
           shared H100, jax 0.11.2, 2026-11-26.

16 rounds of 128 prompts x 4 samples, of 4 optimizer steps each. The reward stands on a response's
last token; gamma and lam are 1, so that it reaches the first: with HALOs' 0.99 and 0.95 a token 100
before the end sees a factor of 0.002 of it. The value head begins at nothing and learns at the
policy's rate, so it is a baseline of little use at first; configs/online_grpo.py does without one
and takes a prompt's other samples for it.

Change first: the rate (--config.optimizer.learning_rate; 2e-6 is that of configs/online_grpo.py,
which has curves of a 0.5B model), then --config.train.epochs=2 (HALOs' `ppo_epochs`).
--config.loss.KL_coef=0.05 adds a term against leaving the SFT checkpoint.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "online"
    config.workdir = "runs/ppo"
    config.loss = {
        "name": "ppo",
        "gamma": 1.0,
        "lam": 1.0,
        "cliprange": 0.2,
        "KL_coef": 0.0,
    }
    config.feedback.type = "scalar"
    config.rounds.prompts_per_round = 128
    config.sampling.num_samples_per_prompt = 4
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.keep_logps = True
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.optimizer.learning_rate = 2e-6
    config.optimizer.weight_decay = 0.0
    config.train.max_length = 1536
    config.train.batch_size = 32  # prompts, with their answers
    config.train.eval_every = 0
    return config
