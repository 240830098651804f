"""Losses on pairs against their formulas in float64, gradients by finite differences."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import (
    LossInputs,
    check_loss,
    get_loss,
    list_losses,
    preference,
    registry,
)
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
    assert set(metrics) == {
        *expected,
        "loss",
        "rewards/chosen_unclamped",
        "rewards/rejected_unclamped",
    }
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


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def cross_entropy_to_preference(margin, epsilon):
    """The reverse KL divergence of (sigmoid(m), sigmoid(-m)) from (1 - epsilon, epsilon)."""
    policy = np.array([sigmoid(margin), sigmoid(-margin)])
    return np.sum(policy * np.log(policy / np.array([1 - epsilon, epsilon])))


# name -> (settings, loss of one pair from its sums R, means M by token, and mean log p of c).
FORMULAS = {
    "dpo": ({"beta": 0.2}, lambda R, M, p: -log_sigmoid(0.2 * (R[0] - R[1]))),
    "dpo_norm": ({"beta": 2.0}, lambda R, M, p: -log_sigmoid(2.0 * (M[0] - M[1]))),
    "cdpo": (
        {"beta": 0.2, "epsilon": 0.3},
        lambda R, M, p: (
            -0.7 * log_sigmoid(0.2 * (R[0] - R[1])) - 0.3 * log_sigmoid(0.2 * (R[1] - R[0]))
        ),
    ),
    "robust": (
        {"beta": 0.2, "epsilon": 0.3},
        lambda R, M, p: (
            (-0.7 * log_sigmoid(0.2 * (R[0] - R[1])) + 0.3 * log_sigmoid(0.2 * (R[1] - R[0]))) / 0.4
        ),
    ),
    "ipo": ({"tau": 0.4}, lambda R, M, p: (M[0] - M[1] - 1 / 0.8) ** 2),
    "hinge": ({"beta": 0.2}, lambda R, M, p: max(0, 1 - 0.2 * (R[0] - R[1]))),
    "apo_zero": ({"beta": 0.2}, lambda R, M, p: sigmoid(0.2 * R[1]) - sigmoid(0.2 * R[0])),
    "apo_down": (
        {"beta": 0.2},
        lambda R, M, p: sigmoid(0.2 * R[0]) - sigmoid(0.2 * (R[0] - R[1])),
    ),
    "sppo": ({"beta": 0.1}, lambda R, M, p: (R[0] - 5) ** 2 + (R[1] + 5) ** 2),
    "exo": (
        {"beta": 0.2, "epsilon": 0.01},
        lambda R, M, p: cross_entropy_to_preference(0.2 * (R[0] - R[1]), 0.01),
    ),
    "nca": (
        {"beta": 0.2},
        lambda R, M, p: (
            -log_sigmoid(0.2 * R[0])
            - 0.5 * log_sigmoid(-0.2 * R[0])
            - 0.5 * log_sigmoid(-0.2 * R[1])
        ),
    ),
    "rpo": (
        {"beta": 0.2, "alpha": 0.5},
        lambda R, M, p: -log_sigmoid(0.2 * (R[0] - R[1])) - 0.5 * p,
    ),
}


def with_formula(name, packed, reference, humanline):
    """Return the mean of the pairs' formula as a function of the policy's token log-probs."""
    formula = FORMULAS[name][1]
    weights = np.array([item.weight for item in packed.items])

    def mean(policy):
        losses = []
        for ours, theirs in zip(policy, reference, strict=True):
            ratios = [p - r for p, r in zip(ours, theirs, strict=True)]
            if humanline:
                ratios = [np.clip(part, -1.0, 1.5) for part in ratios]
            sums = [part.sum() for part in ratios]
            means = [part.sum() / len(part) for part in ratios]
            losses.append(formula(sums, means, ours[0].sum() / len(ours[0])))
        return np.sum(weights * losses) / np.sum(weights)

    return mean


def test_every_loss_on_pairs_with_a_reference_has_its_formula_here():
    losses = [get_loss({"name": name}) for name in list_losses()]
    assert {loss.name for loss in losses if loss.items == "pair" and loss.reference} == {*FORMULAS}


@pytest.mark.parametrize("humanline", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_equal_the_formula(pack, draw_logps, compare, name, humanline):
    packed = pack(PAIR, num_rows=3, weights=True)
    tokens = {"policy": draw_logps(packed, 1), "reference": draw_logps(packed, 2)}
    formula = with_formula(name, packed, tokens["reference"], humanline)
    settings = {"name": name, **FORMULAS[name][0], "humanline": humanline}
    _, metrics, gradient = compare(packed, settings, tokens, formula)
    ratios = packed.place(tokens["policy"]) - packed.place(tokens["reference"])
    inside = (ratios > -1.0) & (ratios < 1.5)
    if humanline and name != "rpo":
        assert not gradient[~inside].any()
    real = packed.batch.is_response
    names = [f"rewards/{half}_unclamped" for half in ("chosen", "rejected")]
    assert sum(metrics[name][0] for name in names) == (inside & real).sum()
    assert sum(metrics[name][1] for name in names) == real.sum()
    assert 0 < metrics[names[0]][0] < metrics[names[0]][1]


def test_the_loss_that_is_documented_equals_its_documented_formula(
    pack, draw_logps, compare, monkeypatch
):
    # halos_jax/losses/README.md
    document = Path(preference.__file__).with_name("README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    loss, formula = (block for block in blocks if "cal_dpo" in block)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    formulas = {}
    exec(loss, dict(vars(preference)))
    exec(formula, {**globals(), "FORMULAS": formulas})
    monkeypatch.setitem(FORMULAS, "cal_dpo", formulas["cal_dpo"])
    packed = pack(PAIR, num_rows=3, weights=True)
    tokens = {"policy": draw_logps(packed, 1), "reference": draw_logps(packed, 2)}
    expected = with_formula("cal_dpo", packed, tokens["reference"], humanline=False)
    compare(packed, {"name": "cal_dpo", **FORMULAS["cal_dpo"][0]}, tokens, expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_finite_where_the_policy_is_the_reference(pack, draw_logps, compare, name):
    # All log-ratios are zero: a mean over the tokens that are not zero would be 0/0.
    packed = pack(PAIR)
    logps = draw_logps(packed, 1)
    formula = with_formula(name, packed, logps, False)
    settings = {"name": name, **FORMULAS[name][0]}
    _, _, gradient = compare(packed, settings, {"policy": logps, "reference": logps}, formula)
    assert np.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in list_losses()
        if (get_loss({"name": name}).items, get_loss({"name": name}).needs) == ("pair", "logps")
    ],
)
def test_an_empty_response_gives_finite_gradients(pack, draw_logps, name):
    packed = pack(PAIR)
    empty = dataclasses.replace(packed.items[0], responses=(packed.items[0].responses[0][:0],) * 2)
    packed = pack.of([empty, *packed.items[1:]])
    loss = get_loss({"name": name})
    reference = packed.place(draw_logps(packed, 2))

    def run(policy):
        return loss(LossInputs(policy=policy, reference=reference), packed.batch)[0]

    value, gradient = jax.value_and_grad(run)(jnp.asarray(packed.place(draw_logps(packed, 1))))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"name": "robust", "epsilon": 0.5}, "epsilon: got 0.5, allowed: 0 or more, less than 0.5"),
        ({"name": "ipo", "tau": 0.0}, "tau: got 0.0, allowed: 1e-06 or more"),
        ({"name": "exo", "epsilon": 0}, "epsilon: got 0, allowed: 1e-09 or more, less than 1"),
    ],
)
def test_values_that_would_divide_by_zero_are_refused(settings, line):
    assert check_loss(settings) == [f"loss.{line}"]
