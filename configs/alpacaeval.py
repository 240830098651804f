"""Your own data: SFT, a reward model on pairs, then 4 rounds of online DPO, as one run.

Command:   python -m halos_jax.main --config=configs/alpacaeval.py:FOLDER --config.workdir=DIR
Hardware:  2 CPU cores, 4 GB of memory; the same command runs on a GPU or TPU.
Time:      33 minutes on two cores that other work kept busy (SFT 10, reward model 5, rounds
           18), 2026-11-23.

FOLDER holds
  base/                    a Hugging Face folder; its config.json and tokenizer are used, the
                           weights are drawn anew (`SCRATCH`)
  feedback_train.jsonl.gz  preference pairs, HALOs' `pairwise_feedback` or {prompt, chosen,
  feedback_test.jsonl.gz   rejected}; SFT learns the preferred outputs, the reward model the pairs
  prompts_train.jsonl      prompts to sample from; 60 of them are held out and watched
  prompts_test.jsonl       prompts to measure with at the start and the end, none of which may be
                           in the file above

Result, with pairs of AlpacaEval (26 models against GPT-4), 462 and 79 prompts, a byte-level BPE of
4,096 tokens fitted on the preferred outputs, and a Llama of 1.1M parameters (hidden 128, 3 layers);
measured when `max_train` and `max_eval` took the first pairs of (shuffled) files, and the rounds
were watched on prompts_test.jsonl (`data.eval`) with nothing of prompts_train.jsonl held out:

  SFT, nats a token of the held-out answers     8.32 -> 5.52
  reward model, accuracy on 800 / 600 pairs     0.77 train / 0.63 test
  round                                         0       1       2       3       4
  held-out reward                              -0.61   -0.11    0.18    0.27    0.31
  response tokens, 128 at most                  110.8   119.4   124.5   126.4   125.8
  responses cut at 128 tokens                   74 %    89 %    95 %    98 %    97 %

This shows the machinery on real data, and reward hacking at its plainest. 1.1M parameters learn the
look of English and of Markdown, not to answer. After the cut at 128 tokens the longer answer of a
pair is the preferred one in 86 % where the lengths differ, and the reward model knows little more
than that: "longer wins, else toss a coin" has 0.64 on the test pairs. So the rounds make responses
that do not end (two thirds of the gain) and that are nothing but Markdown lists (the rest). A model
that can speak needs a `max_tokens` in which its answers end, and a `max_length` to hold them.

With such a model in base/ set SCRATCH to False, and lower the learning rates to what its authors
used.
"""

from ml_collections import ConfigDict

from halos_jax.config import default

SCRATCH = True


def get_config(folder: str = "data/alpacaeval") -> ConfigDict:
    """Return the preset for the files in `folder`."""
    config = default()
    config.task = "pipeline"
    config.workdir = "runs/alpacaeval"
    config.pipeline.tasks = ("sft", "reward_model", "online")

    config.model.path = f"{folder}/base"
    config.model.compute_dtype = "float32"  # CPUs compute bfloat16 more slowly
    config.model.remat = "none"
    config.sampling.max_prompt_length = 64
    config.sampling.max_tokens = 128
    config.sampling.slots = 128
    config.train.max_length = 192  # the two together
    config.train.row_multiple = 64
    config.train.eval_every = 0
    config.train.log_every = 20
    config.rounds.total_prompts = 400
    config.rounds.prompts_per_round = 100

    pairs = {
        "train": f"{folder}/feedback_train.jsonl.gz",
        "eval": f"{folder}/feedback_test.jsonl.gz",
    }
    config.pipeline.overrides = {
        "sft": {
            "model": {"random_init": SCRATCH},
            "data": pairs | {"max_eval": 100, "learn_outputs": "preferred"},
            "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
            "train": {"batch_size": 8, "epochs": 2},
        },
        "reward_model": {
            "model": {"path": "{workdir}/sft/final"},
            "data": pairs | {"max_train": 800, "max_eval": 200},
            "optimizer": {"learning_rate": 5e-4, "schedule": "cosine"},
            "train": {"batch_size": 16},
        },
        "online": {
            "model": {"path": "{workdir}/sft/final"},
            "reward": {
                "path": "{workdir}/reward_model/final",
                "compute_dtype": "float32",
                "max_length": 192,
            },
            "data": {
                "train": f"{folder}/prompts_train.jsonl",
                "holdout": 60,
                "test": f"{folder}/prompts_test.jsonl",
            },
            "optimizer": {"learning_rate": 1e-4},
            "train": {"batch_size": 16},
        },
    }
    return config
