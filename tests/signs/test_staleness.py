"""Staleness by formulas, and against sums over all sequences of a small alphabet."""

import itertools
import math

import numpy as np
import pytest

from halos_jax.signs.intervals import Estimate
from halos_jax.signs.staleness import measure_staleness
from halos_jax.signs.table import STALE


def test_formulas():
    ratios, lengths, prompts = [0.0, math.log(2), -math.log(4)], [2, 1, 4], ["a", "b", "b"]
    found = measure_staleness(ratios, lengths, prompts, is_exact=True)
    weights = np.array([1.0, 2.0, 0.25])
    total = weights @ ratios
    assert found["kl_stale"].value == pytest.approx(math.log(2) / 3)
    assert found["kl_stale_per_token"].value == pytest.approx(math.log(2) / 7)
    assert found["kl_stale_reverse"].value == pytest.approx(total / weights.sum())
    assert found["kl_stale_reverse_per_token"].value == pytest.approx(total / (weights @ lengths))
    assert found["stale_ess"] == pytest.approx(3.25**2 / (3 * (weights**2).sum()))
    assert found["stale_ratio_p50"] == 0 and found["stale_ratio_max"] == math.log(2)
    assert found["stale_ratio_p01"] == pytest.approx(-math.log(4) + 0.02 * math.log(4))
    assert found["stale_ratio_per_token_max"] == math.log(2)
    assert found["stale_ratio_per_token_p99"] == pytest.approx(0.98 * math.log(2))
    assert found.keys() == {name for name in STALE if "sampled" not in name}
    with_interval = {name for name, one in found.items() if isinstance(one, Estimate)}
    assert with_interval == {name for name in found if STALE[name].has_interval}


def test_samples_of_another_distribution_are_no_divergence():
    exact = measure_staleness([0.5, -1.0], [3, 4], ["a", "b"], is_exact=True)
    found = measure_staleness([0.5, -1.0], [3, 4], ["a", "b"], is_exact=False)
    assert found["kl_sampled_stale"] == exact["kl_stale"]
    assert found["kl_sampled_stale_per_token"] == exact["kl_stale_per_token"]
    others = {name for name in exact if not name.startswith("kl_")}
    assert found.keys() == others | {"kl_sampled_stale", "kl_sampled_stale_per_token"}


def test_large_ratios_do_not_overflow():
    found = measure_staleness([900.0, -900.0], [3, 4], ["a", "b"], is_exact=True)
    assert found["stale_ess"] == 0.5 and found["kl_stale_reverse"].value == 900.0


@pytest.mark.parametrize("seed", range(3))
def test_estimates_lie_about_the_sums_over_all_sequences(seed):
    """Of three tokens, one of which ends a response of at most three."""
    rng = np.random.default_rng(seed)
    before = {}
    for length in range(3):
        for prefix in itertools.product((0, 1), repeat=length):
            before[prefix] = rng.dirichlet([1, 1, 1])
    now = {p: (q * rng.uniform(0.6, 1.4, 3)) for p, q in before.items()}
    now = {p: q / q.sum() for p, q in now.items()}

    def enumerate_all(policy):
        def go(prefix, logp):
            for token in range(3):
                one = (*prefix, token)
                after = logp + math.log(policy[prefix][token])
                if token == 2 or len(one) == 3:
                    yield one, after
                else:
                    yield from go(one, after)

        return dict(go((), 0.0))

    old, new = enumerate_all(before), enumerate_all(now)
    forward = sum(math.exp(old[s]) * (old[s] - new[s]) for s in old)
    reverse = sum(math.exp(new[s]) * (new[s] - old[s]) for s in old)
    share = 1 / sum(math.exp(2 * new[s] - old[s]) for s in old)
    sequences = list(old)
    drawn = rng.choice(len(sequences), 4000, p=np.exp(list(old.values())))
    found = measure_staleness(
        [new[sequences[i]] - old[sequences[i]] for i in drawn],
        [len(sequences[i]) for i in drawn],
        list(range(4000)),
        is_exact=True,
    )
    for name, exact in (("kl_stale", forward), ("kl_stale_reverse", reverse)):
        assert abs(found[name].value - exact) < 3.5 * found[name].error
        assert found[name].error < 0.1
    assert found["stale_ess"] == pytest.approx(share, rel=0.05)
