"""Losses on groups against their formulas in float64, gradients by finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, get_loss, list_losses
from halos_jax.losses.registry import _list_parameters
from halos_jax.types import MEMBER

ROLES = (MEMBER,) * 4
KINDS = {name: get_loss({"name": name}) for name in list_losses()}
# Those with a KL term besides are in test_penalised.py.
NAMES = [name for name, loss in KINDS.items() if loss.items == "group" and not loss.penalty]


def give_rewards(pack, packed, seed=0, equal=False):
    rng = np.random.default_rng(seed)
    items = []
    for item in packed.items:
        rewards = np.full(len(item.roles), 0.3) if equal else rng.normal(size=len(item.roles))
        items.append(dataclasses.replace(item, rewards=tuple(map(float, rewards))))
    return pack.of(items, packed.plan.layout.rows)


def near(tokens, seed, scale=0.3):
    """Return log-probs near others, so that some ratios are clipped and some are not."""
    rng = np.random.default_rng(seed)
    return [
        tuple(np.minimum(part + scale * rng.normal(size=len(part)), -1e-3) for part in parts)
        for parts in tokens
    ]


def centred(item):
    return np.array(item.rewards) - np.mean(item.rewards)


def normalised(item, floor, ddof=0):
    return centred(item) / (np.std(item.rewards, ddof=ddof) + floor)  # 0: the population's


def surrogate(advantage, log_ratio, low, high):
    ratio = np.exp(log_ratio)
    return np.minimum(advantage * ratio, advantage * np.clip(ratio, 1 - low, 1 + high))


def clamp(log_ratio, humanline):
    return np.clip(log_ratio, -1.0, 1.5) if humanline else log_ratio


def make_formula(name, packed, other, humanline, frozen, ddof=0):
    """Return the loss as a function of the policy; `frozen` is the policy without gradient."""
    weights = [item.weight for item in packed.items]
    num_tokens = sum(len(response) for item in packed.items for response in item.responses)

    def by_token(each):
        def total(policy):
            parts = zip(packed.items, policy, other, weights, strict=True)
            return sum(w * each(item, p, r) for item, p, r, w in parts) / num_tokens

        return total

    def by_group(each):
        def mean(policy):
            parts = zip(packed.items, policy, other, weights, strict=True)
            return sum(w * each(item, p, r) / len(p) for item, p, r, w in parts) / sum(weights)

        return mean

    def grpo(item, policy, reference):
        total = 0.0
        for a, p, r in zip(normalised(item, 0.01, ddof), policy, reference, strict=True):
            gain = surrogate(a, clamp(p - r, humanline), 0.2, 0.2)
            total += np.sum(-gain + 0.05 * (np.exp(r - p) - (r - p) - 1))
        return total

    def dapo(item, policy, old):
        members = zip(normalised(item, 1e-4, ddof), policy, old, strict=True)
        return sum(-surrogate(a, clamp(p - o, humanline), 0.2, 0.28).sum() for a, p, o in members)

    def dr_grpo(item, policy, old):
        members = zip(centred(item), policy, old, strict=True)
        gains = [surrogate(a, clamp(p - o, humanline), 0.2, 0.2).sum() for a, p, o in members]
        return -sum(gains) / 16

    def gspo(item, policy, old):
        members = zip(normalised(item, 1e-4, ddof), policy, old, strict=True)
        return -sum(surrogate(a, clamp(p - o, humanline).mean(), 0.05, 0.1) for a, p, o in members)

    def rloo(item, policy, reference):
        now = frozen[[item is other for other in packed.items].index(True)]
        rewards = [
            reward - 0.2 * clamp(p - r, humanline).sum()
            for reward, p, r in zip(item.rewards, now, reference, strict=True)
        ]
        total = 0.0
        for number, p in enumerate(policy):
            others = [reward for i, reward in enumerate(rewards) if i != number]
            total -= (rewards[number] - np.mean(others)) * p.sum()
        return total

    found = {
        "grpo": (by_token(grpo), {"beta": 0.05, "epsilon": 0.2}),
        "dapo": (by_token(dapo), {}),
        "dr_grpo": (by_group(dr_grpo), {"max_tokens": 16}),
        "gspo": (by_group(gspo), {"epsilon_low": 0.05, "epsilon_high": 0.1}),
        "rloo": (by_group(rloo), {"beta": 0.2}),
    }
    return found[name]


def take_inputs(loss, policy, other):
    return {"policy": policy, "old" if loss.old else "reference": other}


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_the_deviation_of_the_sample_is_an_option(pack, draw_logps, compare, name):
    packed = give_rewards(pack, pack(ROLES, count=5, num_rows=2, weights=True))
    policy = draw_logps(packed, 1)
    other = near(policy, 2)
    formula, settings = make_formula(name, packed, other, False, policy, ddof=1)
    tokens = take_inputs(get_loss({"name": name}), policy, other)
    settings = {"name": name, "sample_deviation": True, **settings}
    _, metrics, _ = compare(packed, settings, tokens, formula)
    floor = 0.01 if name == "grpo" else 1e-4
    expected = sum(np.abs(normalised(item, floor, ddof=1)).sum() for item in packed.items)
    np.testing.assert_allclose(metrics["rewards/advantage"], (expected, 20), rtol=1e-4)


def test_the_weighted_advantage_is_the_mean_size_of_a_rho(pack, draw_logps, compare):
    packed = give_rewards(pack, pack(ROLES, count=5, num_rows=2))
    policy = draw_logps(packed, 1)
    other = near(policy, 2)
    formula, settings = make_formula("grpo", packed, other, False, policy)
    tokens = take_inputs(get_loss({"name": "grpo"}), policy, other)
    _, metrics, _ = compare(packed, {"name": "grpo", **settings}, tokens, formula)
    sizes = [
        np.abs(advantage * np.exp(p - r))
        for item, ours, theirs in zip(packed.items, policy, other, strict=True)
        for advantage, p, r in zip(normalised(item, 0.01), ours, theirs, strict=True)
    ]
    found = np.concatenate(sizes)
    np.testing.assert_allclose(
        metrics["rewards/weighted_advantage"], (found.sum(), len(found)), rtol=1e-4
    )


@pytest.mark.parametrize("humanline", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_formula(pack, draw_logps, compare, name, humanline):
    packed = give_rewards(pack, pack(ROLES, count=5, num_rows=2, weights=True))
    policy = draw_logps(packed, 1)
    other = near(policy, 2, scale=1.2 if humanline else 0.3)
    formula, settings = make_formula(name, packed, other, humanline, policy)
    tokens = take_inputs(get_loss({"name": name}), policy, other)
    settings = {"name": name, "humanline": humanline, **settings}
    _, metrics, gradient = compare(packed, settings, tokens, formula)
    assert gradient.any()
    assert metrics["rewards/groupsize"] == (80, 20)
    rewards = [reward for item in packed.items for reward in item.rewards]
    np.testing.assert_allclose(metrics["rewards/scores"], (sum(rewards), 20), rtol=1e-5)


def test_defaults_of_grpo_are_those_of_halos(pack, draw_logps):
    packed = give_rewards(pack, pack(ROLES, count=3))
    policy = packed.place(draw_logps(packed, 1))
    inputs = LossInputs(policy=policy, reference=packed.place(draw_logps(packed, 2)))
    values = [
        get_loss({"name": "grpo", **settings})(inputs, packed.batch)[0]
        for settings in ({}, {"beta": 0.01, "epsilon": 0.01}, {"beta": 0.02}, {"epsilon": 0.02})
    ]
    assert values[0] == values[1] and len(set(map(float, values))) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["equal scores", "empty response", "policy is other", "alone"])
def test_gradients_are_finite_at_the_edges(pack, draw_logps, name, case):
    packed = pack(ROLES[:1] if case == "alone" else ROLES, count=3)
    packed = give_rewards(pack, packed, equal=case == "equal scores")
    if case == "empty response":
        first = packed.items[0]
        responses = (first.responses[0][:0], *first.responses[1:])
        packed = pack.of([dataclasses.replace(first, responses=responses), *packed.items[1:]])
    loss = get_loss({"name": name})
    policy = jnp.asarray(packed.place(draw_logps(packed, 1)))
    other = policy if case == "policy is other" else packed.place(near(draw_logps(packed, 1), 2))

    def run(policy):
        return loss(LossInputs(**take_inputs(loss, policy, other)), packed.batch)[0]

    value, gradient = jax.value_and_grad(run)(policy)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if "sample_deviation" in _list_parameters(name):  # of n - 1 = 0 others, say
        loss = get_loss({"name": name, "sample_deviation": True})
        assert np.isfinite(jax.grad(run)(policy)).all()
    if case in ("equal scores", "alone") and loss.old:
        # Nothing was better than anything: no KL term, so nothing to learn.
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_better_sample_becomes_likelier_on_policy(pack, draw_logps, name):
    packed = pack(ROLES, count=1)
    items = [dataclasses.replace(packed.items[0], rewards=(1.0, 0.0, 0.0, 0.0))]
    packed = pack.of(items)
    loss = get_loss({"name": name})
    policy = draw_logps(packed, 1)
    placed = jnp.asarray(packed.place(policy))
    run = lambda x: loss(LossInputs(**take_inputs(loss, x, placed)), packed.batch)[0]  # noqa: E731
    first, *rest = packed.split(jax.grad(run)(placed))[0]
    assert (first < 0).all() and all((part > 0).all() for part in rest)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_member_counts_in_the_groups_statistics_alone(pack, draw_logps, name):
    whole = give_rewards(pack, pack(ROLES, 4))
    items = [
        dataclasses.replace(
            item, masks=tuple(np.full(len(r), copy > 0) for copy, r in enumerate(item.responses))
        )
        for item in whole.items
    ]
    masked = pack.of(items)
    # rloo's penalty is made of tokens, of which a masked member has none.
    settings = {"name": name} | ({"beta": 0.0} if name == "rloo" else {})
    loss = get_loss(settings)
    policy = draw_logps(whole, 0)
    tokens = {"policy": policy, "reference": near(policy, 1), "old": near(policy, 2)}

    def differentiate(packed, tokens):
        placed = {key: jnp.asarray(packed.place(values)) for key, values in tokens.items()}

        def run(policy):
            return loss(LossInputs(**placed | {"policy": policy}), packed.batch)[0]

        return packed.split(jax.grad(run)(placed["policy"]))

    every = differentiate(whole, tokens)
    none = np.zeros(0)
    left = {key: [(none, *parts[1:]) for parts in values] for key, values in tokens.items()}
    rest = differentiate(masked, left)
    counts = whole.batch.num_tokens / masked.batch.num_tokens
    scale = float(counts) if loss.per == "token" else 1.0
    for left, full in zip(rest, every, strict=True):
        assert len(left[0]) == 0
        for one, other in zip(left[1:], full[1:], strict=True):
            np.testing.assert_allclose(one, scale * other, rtol=1e-5, atol=1e-7)
