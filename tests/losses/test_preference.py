"""DPO against its formula in float64, values and gradients by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, get_loss
from halos_jax.types import CHOSEN, REJECTED

PAIR = (CHOSEN, REJECTED)


def log_ratios(policy, reference):
    """Return f64[items, 2]: the sums of log p - log r of chosen and rejected."""
    return np.array(
        [
            [np.sum(p - r) for p, r in zip(ours, theirs, strict=True)]
            for ours, theirs in zip(policy, reference, strict=True)
        ]
    )


def expected_dpo(policy, reference, weights, beta):
    ratios = log_ratios(policy, reference)
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    return np.sum(weights * np.log1p(np.exp(-margins))) / np.sum(weights)


def value_of(packed, policy, reference, beta, padding=0.0):
    inputs = LossInputs(policy=policy, reference=packed.place(reference, padding))
    return get_loss({"name": "dpo", "beta": beta})(inputs, packed.batch)


@pytest.mark.parametrize(("beta", "num_rows", "weights"), [(0.1, 1, False), (0.7, 3, True)])
def test_dpo_equals_its_formula(pack, draw_logps, differentiate, beta, num_rows, weights):
    packed = pack(PAIR, num_rows=num_rows, weights=weights)
    policy, reference = draw_logps(packed, 1), draw_logps(packed, 2)
    scale = np.array([item.weight for item in packed.items])
    formula = functools.partial(expected_dpo, reference=reference, weights=scale, beta=beta)
    loss = lambda values: value_of(packed, values, reference, beta)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(packed.place(policy)))
    np.testing.assert_allclose(value, formula(policy), rtol=1e-6)
    slopes = differentiate(formula, policy)
    np.testing.assert_allclose(gradient, packed.place(slopes), rtol=2e-5, atol=1e-9)


def test_dpo_where_the_policy_is_the_reference_is_ln_2(pack, draw_logps):
    packed = pack(PAIR, count=8)
    logps = draw_logps(packed, 1)
    value, metrics = value_of(packed, packed.place(logps), logps, 0.1)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-7)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{name}"] == (0, 8)


def test_padding_and_packing_do_not_matter(pack, draw_logps):
    values = []
    for num_rows in (1, 2, 5, 9):
        packed = pack(PAIR, num_rows=num_rows)
        policy, reference = draw_logps(packed, 1), draw_logps(packed, 2)
        for padding in (0.0, 1e4):
            placed = packed.place(policy, padding)
            values.append(value_of(packed, placed, reference, 0.3, padding)[0])
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_metrics_are_implicit_rewards(pack, draw_logps):
    packed = pack(PAIR)
    policy, reference = draw_logps(packed, 1), draw_logps(packed, 2)
    _, metrics = value_of(packed, packed.place(policy), reference, 0.2)
    rewards = 0.2 * log_ratios(policy, reference)
    logps = np.array([[part.sum() for part in parts] for parts in policy])
    margins = rewards[:, 0] - rewards[:, 1]
    assert 0 < (margins > 0).mean() < 1
    expected = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    assert set(metrics) == {*expected, "loss"}
    for name, each in expected.items():
        total, count = metrics[name]
        assert count == 7
        np.testing.assert_allclose(total, each.sum(), rtol=1e-5, err_msg=name)


def test_extreme_margins_stay_finite(pack):
    packed = pack(PAIR)
    ones = [tuple(np.ones(len(part)) for part in item.responses) for item in packed.items]
    for sign in (1e6, -1e6):
        policy = [(chosen * sign, rejected * -sign) for chosen, rejected in ones]
        loss = lambda values, packed=packed: value_of(packed, values, ones, 1.0)[0]  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(packed.place(policy)))
        assert np.isfinite(value) and np.isfinite(gradient).all()
