"""The sets that exact draws are made from, by the formula and in float64."""

import numpy as np


def list_kept(values, *, temperature=1.0, top_k=0, top_p=1.0, most=10**9):
    """Return {token: probability}, with which a token is drawn from logits `values [V]`.

    The likeliest tokens that make up top-p of those in top-k, and `most` of them at most.
    """
    values = np.asarray(values, np.float64) / temperature
    weights = np.exp(values - values.max())
    ranked = [int(token) for token in np.argsort(-values, kind="stable") if weights[token] > 0]
    ranked = ranked[:top_k] if top_k else ranked
    sums = np.cumsum(weights[ranked])
    if top_p < 1:
        ranked = ranked[: int(np.searchsorted(sums, top_p * sums[-1])) + 1]
    ranked = ranked[:most]
    return {token: weights[token] / weights[ranked].sum() for token in ranked}
