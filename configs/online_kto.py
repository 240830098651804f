"""Online KTO on your own SFT checkpoint and reward model: HALOs' defaults.

Command:   python -m halos_jax.main --config=configs/online_kto.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  whatever holds the policy with its optimizer and the reward model. Split them over more
           devices with --config.mesh.fsdp=-1 --config.mesh.data=1.
Held out:  256 prompts of prompts.jsonl, sampled after every round (--config.rounds.eval_every=4:
           every fourth). test.jsonl is scored before the first round and at the end alone.
Expect:    `reward_eval` (metrics.jsonl, and a line a round on the console) rises from round 0;
           `rewards_train/chosen` above `rewards_train/rejected` from the first steps on. A
           `rewards_train/KL_estimate` that stays 0 is no fault: it is 0 at least.

4 rounds of 512 prompts x 4 samples. Every sample trains: those above the median reward of the round
are desirable, and those equal to it where that makes the classes more even. They are even, and both
weights stay 1, unless many rewards are equal. With another threshold they are not, and
`loss.desirable_weight` should make up for it: the log suggests a range.

Beta 0.1 is HALOs'. The learning rate is 5e-7, TRL's lower end, and not HALOs' 5e-6: every sample
trains, so a round has five to ten times the steps of one of DPO. KL is the mean over a step's
mismatched answers, so steps should not be smaller than 16.

Measured:  Qwen2.5-Coder-0.5B-Instruct (dequantised from 4 bits) on GSM8K's questions with the right
           answer as the reward (0 or 1, of which a sixth was 1), 16 rounds of 128 prompts, 16 steps
           each, loss.desirable_weight=5; right answers of 4 samples to 400 held-out questions, one
           seed, a third of an H200, 2026-11-26 (colabs/gsm8k_study.ipynb):
             round          0     4     8    12    16     greedy, 1,319 of the test
             right, %    17.1  20.8  23.9  28.4  29.3     24.6 -> 30.2 %
           With 2e-6, and both weights 1 in spite of the warning, the 16 steps of round 1 moved it
           by 25 nats a response (`kl_sampled_stale`); from round 4 on no answer was right.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset: the defaults, with single answers as feedback."""
    config = default()
    config.task = "online"
    config.workdir = "runs/online_kto"
    config.loss.name = "kto"  # beta 0.1
    config.optimizer.learning_rate = 5e-7
    config.feedback.type = "binary"
    config.feedback.threshold = "median"
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.batch_size = 32
    return config
