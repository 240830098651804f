"""Online GRPO on grade-school mathematics, with the right answer as the reward.

Command:   python -m halos_jax.main --config=configs/gsm8k.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
Hardware:  one GPU of 80 GB for models of up to 1.5B parameters; split larger ones over more devices
           with --config.mesh.fsdp=-1 --config.mesh.data=1.
Expect:    `reward_eval` is the share of right answers to 400 training questions that are held out.
           It rises over the rounds; round 0 is the model as it came. Where that is near 0 or 1,
           most groups have equal rewards (`tied_share` near 1): little to learn. `reward_test` is
           the share of right greedy answers to the test questions, in round 0 and of `final/`.
Measured:  Qwen2.5-Coder-0.5B-Instruct (dequantised from 4 bits), trained on 7,073 of the training
           questions, 4 samples of each of the other 400 held out (data.train, data.eval, their
           files; data.max_eval=0); one H200, which four runs shared, jax 0.11.2, 2026-11-26:
             round         0     2     4     6     8    10    12    16    20    28
             right, %   14.2  19.1  23.0  26.1  28.6  30.9  31.9  35.0  36.1  39.5
           and greedily of all 1,319 test questions 25.2 % before, 40.2 % after (`task=eval` with
           sampling.temperature=0, num_samples_per_prompt=1). With twice the rate (4e-6) rounds 1
           to 9 were alike (28.9 % in round 9). Three seeds as the preset is, 8 samples of each
           held-out question, one GPU each (sampling.slots=1024, train.tokens_per_device=32768),
           until 2,816 questions were used, from start to final/ in 436, 494 and 459 s of an H200,
           of which nearly two minutes were compilation; a round takes 20 s:
             round         0     4     8    11     other 400, temperature 0.8, start -> final/
             right, %   15.2  24.8  31.4  34.6     17.6 -> 36.8
                        15.9  27.4  31.7  34.1     17.9 -> 35.4
                        15.3  25.4  30.8  34.8     18.6 -> 36.4
           (The other 400 questions choose nothing: 4 samples of each.) Three seeds before these, on
           H100s, were at 30.4, 30.0, 28.6 % in round 8, and at 33.7 and 33.4 in round 12.

Questions come from the hub (openai/gsm8k). Files of your own need a record `{"question", "answer"}`
each, where the answer is a number or ends with "#### number":

  --config.data.train=train.jsonl --config.data.test=test.jsonl

The reward is 1 where the response's final number equals the answer's, else 0 (`numeric_answer`).
The loss and its reasons are those of configs/online_grpo.py, as is sampling at temperature 1; at
another temperature, top-p or top-k ratios are exact, too (`sampling.exact_ratios=auto`). A round
takes 256 questions, 8 samples of each and 8 optimizer steps; the run takes each of the other 7,073
training questions once. Start from a model that follows instructions: nothing but its own chat
template stands around a question.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "online"
    config.workdir = "runs/gsm8k"
    config.data.train = "openai/gsm8k:main@train"
    config.data.holdout = 400
    config.data.test = "openai/gsm8k:main@test"
    config.eval.test_temperature = 0.0
    config.reward.kind = "function"
    config.reward.function = "halos_jax.rewards.functions:numeric_answer"
    config.loss.name = "dapo"
    config.feedback.type = "scalar"
    config.rounds.total_prompts = 7073
    config.rounds.prompts_per_round = 256
    config.rounds.eval_every = 4
    config.sampling.num_samples_per_prompt = 8
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.keep_logps = True
    config.sampling.max_prompt_length = 256
    config.sampling.max_tokens = 320
    config.optimizer.learning_rate = 2e-6
    config.optimizer.warmup_steps = 8
    config.optimizer.weight_decay = 0.0
    config.train.max_length = 576
    config.train.batch_size = 32  # groups
    config.train.eval_every = 0
    return config
