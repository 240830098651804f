"""Staleness: how far a round's training has moved the policy away from its own samples.

A log-ratio here is log p(response) under the policy now less that under the policy that sampled, in
nats. Names are those of `table.STALE`.
"""

from collections.abc import Sequence

import numpy as np

from halos_jax.signs.intervals import Estimate, estimate_mean, estimate_ratio

_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}


def measure_staleness(
    ratios: Sequence[float], lengths: Sequence[int], prompts: Sequence[str], *, is_exact: bool
) -> dict[str, Estimate | float]:
    """Return both KL divergences, the effective sample size and the tails of the log-ratios.

    KL(sampled || now) is the mean of -ratio. KL(now || sampled) is the mean of ratio under the
    policy now, for which responses of the policy that sampled stand with weights exp(ratio),
    normalised to 1. Their effective sample size is (sum w)^2 / (n sum w^2) of n (Kong 1992).

    Args:
      lengths, prompts: the tokens and the prompt of each response.
      is_exact: whether the responses were drawn from the policy itself, at temperature 1 and from
        all tokens. Else the means are no divergences: the first has another name, the second,
        whose weights would be wrong, is left out.
    """
    array, tokens = np.asarray(ratios, np.float64), np.asarray(lengths, np.float64)
    names, sizes = list(prompts), tokens.tolist()
    weights = np.exp(array - array.max())
    first = "kl_stale" if is_exact else "kl_sampled_stale"
    found: dict[str, Estimate | float] = {
        first: estimate_mean((-array).tolist(), names),
        f"{first}_per_token": estimate_ratio((-array).tolist(), sizes, names),
    }
    if is_exact:
        weighed = (weights * array).tolist()
        found |= {
            "kl_stale_reverse": estimate_ratio(weighed, weights.tolist(), names),
            "kl_stale_reverse_per_token": estimate_ratio(
                weighed, (weights * tokens).tolist(), names
            ),
        }
    found["stale_ess"] = float(weights.sum() ** 2 / (len(array) * np.sum(weights**2)))
    for name, share in _QUANTILES.items():
        found[f"stale_ratio_{name}"] = float(np.quantile(array, share))
    for name, share in _QUANTILES.items():
        found[f"stale_ratio_per_token_{name}"] = float(np.quantile(array / tokens, share))
    return found
