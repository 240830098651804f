"""Every vital sign: its name in metrics.jsonl and in manifests, its unit and its definition.

`halos_jax/signs/README.md` shows this table. An estimate NAME comes with NAME/low and NAME/high,
its 95 % confidence interval.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Sign(NamedTuple):
    """A metric's unit, its definition, and whether it comes with an interval."""

    unit: str
    meaning: str
    has_interval: bool = True


_RATIO = "log-ratio of the policy now to the policy that sampled, of a watched response"

# Before a round's training, from the samples that the current policy has drawn.
FRESH: Mapping[str, Sign] = {
    "kl_sft": Sign(
        "nats a sequence",
        "KL divergence of the policy from the SFT checkpoint: mean log-ratio of the watched "
        "samples, where these are drawn at temperature 1 from all tokens",
    ),
    "kl_sft_per_token": Sign("nats a token", "the same, divided by the response tokens"),
    "kl_sampled": Sign(
        "nats a sequence",
        "the same mean log-ratio where samples are drawn otherwise (temperature, top-p, top-k): "
        "an expectation under the sampling distribution, not a KL divergence",
    ),
    "kl_sampled_per_token": Sign("nats a token", "the same, divided by the response tokens"),
    "entropy": Sign(
        "nats a token",
        "entropy of the next-token distribution at temperature 1, unfiltered: mean over all "
        "tokens of all samples",
    ),
    "fresh_margin": Sign(
        "implicit reward",
        "implicit reward of the better response less that of the worse one, of the round's pairs "
        "before training on them",
    ),
    "fresh_accuracy": Sign("share", "of these pairs, with a margin above 0; equal ones count half"),
    "fresh_loss": Sign("nats", "mean of -log sigmoid(margin) of these pairs: ln 2 at margin 0"),
    "implicit_accuracy": Sign(
        "share",
        "of all pairs of a prompt's watched samples with different rewards, those that the "
        "implicit reward orders as the scorer does; equal ones count half",
    ),
    "reward_train_mean": Sign("reward", "mean reward of all samples that have one"),
    "reward_best": Sign("reward", "mean over prompts of the best sample's reward"),
    "reward_worst": Sign("reward", "mean over prompts of the worst sample's reward"),
    "reward_spread": Sign(
        "reward", "mean over prompts of the standard deviation of the samples' rewards (over n)"
    ),
    "tied_share": Sign("share", "of the prompts, those whose samples all have the same reward"),
    "truncated_share": Sign("share", "of the samples, those cut by sampling.max_tokens"),
    "response_tokens_mean": Sign("tokens", "mean length of the responses"),
    "repeated_4grams": Sign(
        "share",
        "of a response's sequences of four tokens, those that occurred before in it; mean over the "
        "responses",
    ),
}

# Of the samples themselves: the same log-probabilities by the sampler and by the trainer.
PROOF: Mapping[str, Sign] = {
    "rescore_mean": Sign(
        "nats a token",
        "mean absolute difference of the log-probabilities that the sampler wrote and those that "
        "the trainer's forward pass gives the re-scored samples",
        False,
    ),
    "rescore_max": Sign("nats a token", "largest of these differences", False),
    "rescore_tokens": Sign("count", "tokens that were re-scored", False),
}

# After a round's training, on its own watched responses.
STALE: Mapping[str, Sign] = {
    "kl_stale": Sign(
        "nats a sequence",
        "KL divergence of the policy that sampled from the policy now: mean log-ratio, where "
        "samples are drawn at temperature 1 from all tokens",
    ),
    "kl_stale_per_token": Sign("nats a token", "the same, divided by the response tokens"),
    "kl_sampled_stale": Sign(
        "nats a sequence",
        "the same mean log-ratio where samples are drawn otherwise: not a KL divergence",
    ),
    "kl_sampled_stale_per_token": Sign("nats a token", "the same, divided by the response tokens"),
    "kl_stale_reverse": Sign(
        "nats a sequence",
        "KL divergence of the policy now from the policy that sampled, by self-normalised "
        "importance weights; worth no more than stale_ess",
    ),
    "kl_stale_reverse_per_token": Sign("nats a token", "the same, divided by the response tokens"),
    "stale_ess": Sign(
        "share",
        "effective sample size of these weights, of the number of watched responses; a collapse "
        "can hide from it",
        has_interval=False,
    ),
    "stale_ratio_p01": Sign("nats a sequence", f"1 % quantile of the {_RATIO}", False),
    "stale_ratio_p50": Sign("nats a sequence", "50 % quantile of the same", False),
    "stale_ratio_p99": Sign("nats a sequence", "99 % quantile of the same", False),
    "stale_ratio_max": Sign("nats a sequence", "largest of the same", False),
    "stale_ratio_per_token_p01": Sign(
        "nats a token", f"1 % quantile of the {_RATIO}, divided by its tokens", False
    ),
    "stale_ratio_per_token_p50": Sign("nats a token", "50 % quantile of the same", False),
    "stale_ratio_per_token_p99": Sign("nats a token", "99 % quantile of the same", False),
    "stale_ratio_per_token_max": Sign("nats a token", "largest of the same", False),
}

# After a round's training, on watched responses of earlier rounds that it has replayed.
REPLAYED: Mapping[str, Sign] = {
    "kl_stale_age/NAME": Sign(
        "nats a sequence",
        "as kl_stale, of watched responses that the round has replayed (feedback.replay) and that "
        "were sampled NAME rounds before it",
    ),
    "kl_sampled_stale_age/NAME": Sign(
        "nats a sequence", "the same where samples are drawn otherwise: not a KL divergence"
    ),
}

# Of samples for prompts that are not trained on; NAME is a part of the reward or a scorer.
HELD_OUT: Mapping[str, Sign] = {
    "reward_eval": Sign("reward", "mean reward of the held-out samples that have one"),
    "reward_eval/NAME": Sign("reward", "the same by a part of the reward or by a scorer"),
    "win_rate_eval": Sign(
        "share",
        "of the held-out samples, those with a higher reward than the sample of the same prompt "
        "and number in round 0; equal ones count half",
    ),
    "win_rate_eval/NAME": Sign("share", "the same by a scorer"),
    "truncated_eval": Sign("share", "of the held-out samples, those cut by sampling.max_tokens"),
    "response_tokens_eval": Sign("tokens", "mean length of the held-out responses"),
    "unlabelled_eval": Sign("count", "held-out samples without a reward", False),
}

SIGNS: Mapping[str, Sign] = {**PROOF, **FRESH, **STALE, **REPLAYED, **HELD_OUT}
