"""A preset as small as a whole run can be; `inputs` is the folder that the fixture made."""

from ml_collections import ConfigDict

from halos_jax.config import default


def get_config(inputs: str) -> ConfigDict:
    """Return an online run of 2 rounds of 6 prompts x 3 samples, with 4 held-out prompts."""
    config = default()
    config.progress = False
    config.report.enabled = False
    config.model.path = f"{inputs}/policy"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.reward.path = f"{inputs}/reward"
    config.reward.compute_dtype = "float32"
    config.reward.max_length = 16
    config.data.train = f"{inputs}/prompts.jsonl"
    config.data.eval = f"{inputs}/eval.jsonl"
    config.rounds.total_prompts = 12
    config.rounds.prompts_per_round = 6
    config.sampling.num_samples_per_prompt = 3
    config.sampling.temperature = 1.0
    config.sampling.top_p = 1.0
    config.sampling.max_prompt_length = 8
    config.sampling.max_tokens = 6
    config.sampling.slots = 8
    config.sampling.chunk = 3
    config.sampling.shard_prompts = 2
    config.optimizer.learning_rate = 1e-2
    config.train.batch_size = 2
    config.train.max_length = 16
    config.train.row_multiple = 64
    config.train.eval_every = 2
    config.checkpoint.every = 1
    return config
