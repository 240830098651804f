"""On-policy distillation: your own checkpoint learns from a larger model of its family.

Command:   python -m halos_jax.main --config=configs/online_distill.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.model.teacher=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
Hardware:  whatever holds the policy with its optimizer, and the teacher in bfloat16 beside it,
           which stays in the devices' memory for the whole run. Split both over more devices with
           --config.mesh.fsdp=-1 --config.mesh.data=1.
Held out:  256 prompts of prompts.jsonl; `loss/eval` is the loss on the first policy's samples of
           them. There is no reward; --config.eval.scorers.NAME.kind=function measures what you
           care about (--config.eval.scorers.NAME.function=package.module:function).
Expect:    `loss/train`, the divergence from the teacher in nats a token, falls; at the first step
           of a round it is that of fresh samples. `rewards_train/log_ratio`, the mean of
           log p(policy) - log p(teacher) over the sampled tokens, estimates it, and falls too.

16 rounds of 128 prompts x 4 samples, of 16 optimizer steps each: short rounds, since the loss is
that of the policy's own samples only while they are fresh. Every sample trains.

The loss is "gkd" (Agarwal et al. 2023) with beta=1: KL(policy || teacher) over the whole vocabulary
at each token that the policy has sampled. --config.loss.beta=0.5 is the Jensen-Shannon divergence,
TRL's default, and 0 the forward KL. The teacher must have the policy's tokenizer; its vocabulary
may be padded further. Samples are drawn at temperature 1 from all tokens: from the policy itself.

Answers of the teacher, or of people, train it by the same loss on a file, with --config.task=align,
--config.loss.beta=0 and the file in --config.data.train.

Measured:  nothing yet: neither the learning rate nor the batch has been compared with others.
"""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config() -> ConfigDict:
    """Return the preset: reverse KL to a teacher on the policy's own samples, without a reward."""
    config = default()
    config.task = "online"
    config.workdir = "runs/online_distill"
    config.loss = {"name": "gkd", "beta": 1.0}
    config.feedback.type = "samples"
    config.reward.kind = "none"
    config.rounds.prompts_per_round = 128
    config.sampling.num_samples_per_prompt = 4
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.max_prompt_length = 512
    config.sampling.max_tokens = 1024
    config.optimizer.learning_rate = 5e-6
    config.optimizer.weight_decay = 0.0
    config.train.max_length = 1536
    config.train.batch_size = 32  # samples
    config.train.eval_every = 16
    return config
