"""Online DPO with a judge behind an API as the reward: no reward model is needed.

Command:   python -m halos_jax.main --config=configs/judge.py --config.workdir=runs/NAME
             --config.model.path=DIR_OR_HUB_ID
             --config.data.train=prompts.jsonl --config.data.holdout=64
             --config.reward.judge.model=MODEL --config.reward.judge.url=https://HOST/v1
Hardware:  whatever holds the policy with its optimizer: one GPU of 80 GB for models of up to 1.5B
           parameters; and a server with OpenAI's chat completions, or the service itself, whose key
           is in the environment variable OPENAI_API_KEY.
Cost:      a question for each sample: 8,192 to train (4 rounds of 512 prompts x 4) and 1,280 for
           the held-out ones (64 prompts x 4, 5 times), and one at the start; samples of a prompt
           with the same text are asked about once. 16 are in flight at a time: where an answer
           takes 2 s, scoring takes 20 minutes in all.
Expect:    `reward_eval`, the mean score from 0 to 10, rises. Scores are few numbers, so samples of
           a prompt often tie (`tied_share`) and make no pair.
Measured:  the pace alone, with a stand-in for a judge that answers after 0.2 s: 362 questions about
           512 samples in 6.1 s, 59 a second of the 80 that 16 in flight allow (the quickstart's
           task, 2 CPU cores beside other work, jax 0.10.2, 2026-11-26). Not measured with a real
           judge; the learning rate is that of configs/online_dpo.py, which has curves.

Change first: what is asked (--config.reward.judge.rubric=FILE, a Jinja file), then
--config.reward.judge.concurrency to what the server bears. --config.reward.judge.mode=compare
compares two samples instead: six questions in both orders for a prompt's four samples, 12 in all,
and few ties; its held-out mean is 1/2 whatever the policy, so give it --config.reward.rules to
watch. Answers are kept in judge.jsonl: a question that was answered is never asked again.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset."""
    config = default()
    config.task = "online"
    config.workdir = "runs/judge"
    config.reward.kind = "judge"
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.train.max_length = 1536
    config.train.eval_every = 0
    return config
