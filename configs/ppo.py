"""Online PPO with a value head on your own SFT checkpoint and reward model.

Command:   python -m halos_jax.main --config=configs/ppo.py --config.workdir=runs/NAME
             --config.model.path=DIR --config.reward.path=DIR
             --config.data.train=prompts.jsonl --config.data.holdout=256
             --config.data.test=test.jsonl
Hardware:  x
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
    config.train.batch_size = 128  # answers
    config.train.eval_every = 0
    return config
