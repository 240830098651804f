"""Online GRPO on your own SFT checkpoint and reward model, with DAPO's loss.

Command:   python -m halos_jax.main --config=configs/online_grpo.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  whatever holds the policy with its optimizer and the reward model. Split them over more
           devices with --config.mesh.fsdp=-1 --config.mesh.data=1.
Held out:  256 prompts of prompts.jsonl, sampled after every round (--config.rounds.eval_every=4:
           every fourth). test.jsonl is scored before the first round and at the end alone.
Expect:    `reward_eval` (metrics.jsonl, and a line a round on the console) rises over the rounds;
           the loss itself stays near 0. `rewards_train/advantage` of 0 means that all samples of a
           prompt have the same reward, and nothing to learn from.

16 rounds of 128 prompts x 8 samples, of 4 optimizer steps each: short rounds, since the advantages
are those of the policy that sampled. All samples of a prompt train, as one group.

The loss is "dapo": advantages divided by the group's deviation, ratios to the policy that sampled
clipped to 0.8 .. 1.28, the mean over all tokens, no KL term. With --config.loss.epsilon_high=0.2 it
is what TRL's GRPO does by default. Ratios need the samples' own log-probabilities (`keep_logps`),
which are those at temperature 1 over all tokens: so that is how it samples. At another temperature,
top-p or top-k ratios are exact, too: samples then say what their tokens were drawn from
(`sampling.exact_ratios=auto`), for a little more memory.
--config.loss.name=dr_grpo, gspo, cispo, sapo or rloo needs no other change. GRPO as published is
--config.loss.name=grpo_clip: the same ratio, and a KL term to the SFT checkpoint besides
(--config.loss.beta; its forward pass costs time); --config.loss.aggregation=token averages it as
TRL and verl do by default. HALOs' own grpo takes ratios to the reference, clipped to 0.99 .. 1.01:
with the SFT checkpoint for reference, a token that should become likelier stops learning once it is
1 % likelier than under it. Take it with --config.rounds.reference=round_start, or with a larger
--config.loss.epsilon.

Measured:  the learning rate is 2e-6, twice TRL's. With it a 0.5B model rose from 15.0, 15.0, 15.5
           to 30.0, 30.4, 28.6 % right answers in 64 steps of 32 groups (three seeds, 8 rounds
           of 256 prompts; configs/gsm8k.py has the curve, colabs/gsm8k_study.ipynb the runs);
           with 1e-6 from 13.4 to 15.9 % in 32 steps (16 rounds of 64). In this preset's own rounds
           of 128 prompts, 4 steps each, it rose from 14.7 to 25.4 % in 8 rounds (one seed, cut
           there; 256-prompt rounds had 24.8, 27.4, 25.4 % after as many prompts).
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset: groups of 8 scored samples, near to on-policy."""
    config = default()
    config.task = "online"
    config.workdir = "runs/online_grpo"
    config.loss.name = "dapo"
    config.feedback.type = "scalar"
    config.rounds.prompts_per_round = 128
    config.sampling.num_samples_per_prompt = 8
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.keep_logps = True
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.optimizer.learning_rate = 2e-6
    config.optimizer.weight_decay = 0.0
    config.train.max_length = 1536
    config.train.batch_size = 32  # groups
    config.train.eval_every = 0
    return config
