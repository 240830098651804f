"""KTO and BCO against their formulas in float64; statistics over the step, not the microbatch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, average_metrics, get_loss
from halos_jax.losses.unpaired import suggest_weights
from halos_jax.types import MISMATCHED, TARGET

ROLES = (TARGET, MISMATCHED)
LABELS = [True, False, False, True, True, False, True]


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def relabel(pack, packed, labels):
    items = [
        dataclasses.replace(item, desirable=label)
        for item, label in zip(packed.items, labels, strict=True)
    ]
    return pack.of(items, packed.plan.layout.rows)


def sum_ratios(policy, reference, humanline):
    """Return f64[items, 2]: R of the answers and of the mismatched ones."""
    ratios = [
        [np.clip(p - r, -1, 1.5) if humanline else p - r for p, r in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(policy, reference, strict=True)
    ]
    return np.array([[part.sum() for part in parts] for parts in ratios])


def make_kto(reference, labels, weights, frozen, humanline=False, **settings):
    """Return KTO as a function of the policy; KL is of `frozen`, since it has no gradient."""
    beta, good, bad = (
        settings.get(name, default)
        for name, default in (("beta", 0.1), ("desirable_weight", 1), ("undesirable_weight", 1))
    )
    kl = max(0.0, sum_ratios(frozen, reference, humanline)[:, 1].mean())

    def formula(policy):
        ratios = sum_ratios(policy, reference, humanline)[:, 0]
        losses = [
            good * (1 - sigmoid(beta * (r - kl))) if label else bad * (1 - sigmoid(beta * (kl - r)))
            for r, label in zip(ratios, labels, strict=True)
        ]
        return np.sum(weights * np.array(losses)) / np.sum(weights)

    return formula, kl


@pytest.mark.parametrize("humanline", [False, True])
@pytest.mark.parametrize("seed", [1, 4])  # one with KL above 0, one where it is clipped to 0
def test_kto_equals_its_formula(pack, draw_logps, compare, humanline, seed):
    packed = relabel(pack, pack(ROLES, num_rows=3, weights=True), LABELS)
    weights = np.array([item.weight for item in packed.items])
    tokens = {"policy": draw_logps(packed, seed), "reference": draw_logps(packed, 5 - seed)}
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    formula, kl = make_kto(
        tokens["reference"], LABELS, weights, tokens["policy"], humanline, **settings
    )
    _, metrics, gradient = compare(
        packed, {"name": "kto", "humanline": humanline, **settings}, tokens, formula
    )
    mismatched = packed.place([tuple(p * 0 + r for r, p in enumerate(x)) for x in tokens["policy"]])
    assert not gradient[mismatched == 1].any()  # KL has no gradient
    np.testing.assert_allclose(metrics["rewards/KL_estimate"], (7 * kl, 7), rtol=1e-5)
    ratios = sum_ratios(tokens["policy"], tokens["reference"], humanline)[:, 0]
    for name, label in (("chosen", True), ("rejected", False)):
        mine = [0.3 * r for r, which in zip(ratios, LABELS, strict=True) if which == label]
        np.testing.assert_allclose(metrics[f"rewards/{name}"], (sum(mine), len(mine)), rtol=1e-4)
    labels = np.array(LABELS)
    margin = 0.3 * (ratios[labels].mean() - ratios[~labels].mean())  # HALOs' meaning of it
    averaged = average_metrics(metrics)
    np.testing.assert_allclose(averaged["rewards/margins"], margin, rtol=1e-4)
    distances = 0.3 * np.where(labels, ratios - kl, kl - ratios)
    np.testing.assert_allclose(averaged["rewards/signed_distance"], distances.mean(), rtol=1e-4)
    np.testing.assert_allclose(averaged["rewards/accuracies"], (distances > 0).mean(), rtol=1e-6)


def test_the_two_seeds_have_a_positive_and_a_clipped_kl(pack, draw_logps):
    packed = relabel(pack, pack(ROLES, num_rows=3, weights=True), LABELS)
    means = [
        sum_ratios(draw_logps(packed, seed), draw_logps(packed, 5 - seed), False)[:, 1].mean()
        for seed in (1, 4)
    ]
    assert min(means) < 0 < max(means)


@pytest.mark.parametrize("humanline", [False, True])
@pytest.mark.parametrize("labels", [LABELS, [True] * 7, [False] * 7])
def test_bco_equals_its_formula(pack, draw_logps, compare, labels, humanline):
    packed = relabel(pack, pack(ROLES, weights=True), labels)
    weights = np.array([item.weight for item in packed.items])
    tokens = {"policy": draw_logps(packed, 1), "reference": draw_logps(packed, 2)}
    fixed = sum_ratios(tokens["policy"], tokens["reference"], humanline)[:, 0]
    classes = [fixed[np.array(labels) == label] for label in (True, False)]
    delta = np.mean([group.mean() for group in classes if len(group)])

    def formula(policy):
        margins = 0.3 * (sum_ratios(policy, tokens["reference"], humanline)[:, 0] - delta)
        losses = -log_sigmoid(np.where(labels, margins, -margins))
        return np.sum(weights * losses) / np.sum(weights)

    compare(packed, {"name": "bco", "beta": 0.3, "humanline": humanline}, tokens, formula)


@pytest.mark.parametrize("name", ["kto", "bco"])
@pytest.mark.parametrize("case", ["one class", "empty response", "policy is reference", "alone"])
def test_gradients_are_finite_at_the_edges(pack, draw_logps, name, case):
    packed = relabel(pack, pack(ROLES), [True] * 7 if case == "one class" else LABELS)
    if case == "empty response":
        first = packed.items[0]
        empty = dataclasses.replace(first, responses=(first.responses[0][:0],) * 2)
        packed = pack.of([empty, *packed.items[1:]])
    if case == "alone":  # a step of one example that found no partner
        first = packed.items[0]
        packed = pack.of(
            [dataclasses.replace(first, responses=first.responses[:1], roles=ROLES[:1])]
        )
    policy = jnp.asarray(packed.place(draw_logps(packed, 1)))
    same = case == "policy is reference"
    reference = policy if same else packed.place(draw_logps(packed, 2))
    loss = get_loss({"name": name})

    def run(policy):
        inputs = LossInputs(policy=policy, reference=reference)
        inputs = inputs.replace(statistics=loss.measure(inputs, packed.batch))
        return loss(inputs, packed.batch)[0]

    value, gradient = jax.value_and_grad(run)(policy)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.asarray(gradient).any()
    if same:
        np.testing.assert_allclose(value, {"kto": 0.5, "bco": np.log(2)}[name], rtol=1e-6)


def test_suggested_weights_balance_the_classes():
    low, high = suggest_weights(200, 100)
    assert (low, high) == (0.5, 0.5 * 4 / 3)
    for weight in (low, high):
        assert 1 - 1e-9 <= weight * 200 / 100 <= 4 / 3 + 1e-9
    assert suggest_weights(0, 5) == suggest_weights(5, 0) == (1.0, 1.0)
