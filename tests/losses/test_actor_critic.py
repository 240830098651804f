"""PPO against loops in float64 written from the papers: advantages, clipping, critic, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, check_loss, get_loss
from halos_jax.losses.actor_critic import discount_rewards, estimate_advantages
from halos_jax.types import MEMBER


@pytest.fixture
def draw(pack):
    """Return packed items of 1 to 3 scored answers, with drawn token values by name."""

    def make(seed=0, shift=0.0):
        rng = np.random.default_rng(seed)
        items = [
            dataclasses.replace(
                item,
                responses=item.responses[: 1 + number % 3],
                roles=item.roles[: 1 + number % 3],
                rewards=tuple(shift + rng.normal(size=3))[: 1 + number % 3],
                weight=1.0,
            )
            for number, item in enumerate(pack((MEMBER,) * 3).items)
        ]
        packed = pack.of(items)

        def tokens(scale, offset=0.0):
            return [
                tuple(offset + scale * rng.normal(size=len(r)) for r in item.responses)
                for item in packed.items
            ]

        policy = tokens(1.0, -3.0)
        moved = [tuple(x + 0.4 * rng.normal(size=len(x)) for x in parts) for parts in policy]
        names = {"reference": tokens(1.0, -3.0), "old": moved, "entropies": tokens(1.0)}
        names |= {"policy": policy, "values": tokens(1.0), "old_values": tokens(1.0)}
        return packed, names

    return make


def flatten(items, tokens):
    """Return (reward, token values) of each answer."""
    pairs = zip(items, tokens, strict=True)
    return [(r, x) for item, parts in pairs for r, x in zip(item.rewards, parts, strict=True)]


def plain_advantages(reward, values, gamma, lam):
    """Sum the definition (Schulman et al. 2016, equation 11), without any recursion."""
    rewards = [0.0] * (len(values) - 1) + [reward]
    later = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, later, values)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def plain_returns(reward, length, gamma):
    return [gamma ** (length - 1 - t) * reward for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.7, 0.0), (0.0, 0.5)])
def test_advantages_and_returns_are_those_of_each_sequence_alone(draw, gamma, lam):
    packed, tokens = draw()
    # What stands at padding must not leak into the sequence before it.
    values = packed.place(tokens["old_values"], padding=1e6)
    found = packed.split(estimate_advantages(values, packed.batch, gamma=gamma, lam=lam))
    for (reward, own), (_, got) in zip(
        flatten(packed.items, tokens["old_values"]), flatten(packed.items, found)
    ):
        np.testing.assert_allclose(got, plain_advantages(reward, own, gamma, lam), atol=2e-6)
    found = packed.split(discount_rewards(packed.batch, gamma=gamma))
    for reward, got in flatten(packed.items, found):
        np.testing.assert_allclose(got, plain_returns(reward, len(got), gamma), atol=1e-6)


def plain_loss(items, tokens, *, clip=0.5, critic=0.01, kl=0.1, gamma=0.99, lam=0.95, **options):
    """Write the loss and its metrics as loops; `options`: value_clip, gae, humanline."""
    flat = {name: flatten(items, values) for name, values in tokens.items()}
    advantages, goals, returns = [], [], []
    for reward, values in flat["old_values"]:
        own = plain_advantages(reward, values, gamma, lam)
        advantages += own
        returns += plain_returns(reward, len(values), gamma)
        goals += [a + v for a, v in zip(own, values)]
    goals = goals if options.get("gae") else returns
    whitened = (np.array(advantages) - np.mean(advantages)) / np.sqrt(np.var(advantages) + 1e-8)
    flat = {name: np.concatenate([x for _, x in values]) for name, values in flat.items()}
    total = clipped = 0.0
    for t in range(len(whitened)):
        ratio = flat["policy"][t] - flat["old"][t]
        ratio = np.exp(np.clip(ratio, -1, 1.5) if options.get("humanline") else ratio)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        total += max(-whitened[t] * ratio, -whitened[t] * bounded)
        clipped += -whitened[t] * bounded > -whitened[t] * ratio
        value, old = flat["values"][t], flat["old_values"][t]
        error = (value - goals[t]) ** 2
        if width := options.get("value_clip"):
            near = old + min(max(value - old, -width), width)
            error = max(error, (near - goals[t]) ** 2)
        total += critic * 0.5 * error + kl * (flat["policy"][t] - flat["reference"][t])
    count = len(whitened)
    metrics = {
        "clipfrac/policy": clipped / count,
        "returns/mean": np.mean(returns),
        "returns/var": np.var(returns),
        "val/mean": np.mean(flat["old_values"]),
        "val/var": np.var(flat["old_values"]),
        "val/vpred": np.mean(flat["values"]),
        "val/error": np.mean((flat["values"] - goals) ** 2),
        "loss/entropy": np.mean(flat["entropies"]),
        "loss/policykl": np.mean(flat["old"] - flat["policy"]),
        "rewards/KL": np.mean(flat["policy"] - flat["reference"]),
    }
    return total / count, metrics


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        (
            {"cliprange": 0.1, "critic_coef": 2.0, "KL_coef": 0.0, "gamma": 1, "lam": 0.5},
            {"clip": 0.1, "critic": 2.0, "kl": 0.0, "gamma": 1, "lam": 0.5},
        ),
        ({"cliprange_value": 0.3, "critic_coef": 1.0}, {"value_clip": 0.3, "critic": 1.0}),
        ({"gae_returns": True, "critic_coef": 1.0}, {"gae": True, "critic": 1.0}),
        ({"humanline": True, "cliprange": 5.0}, {"humanline": True, "clip": 5.0}),
    ],
)
def test_ppo_is_the_formula(draw, compare, settings, options):
    packed, tokens = draw(3)
    if "humanline" in settings:  # ratios outside of the interval, too
        tokens["old"] = [tuple(3 * x for x in parts) for parts in tokens["old"]]

    def formula(policy):
        return plain_loss(packed.items, tokens | {"policy": policy}, **options)[0]

    _, metrics, gradient = compare(packed, {"name": "ppo"} | settings, tokens, formula, rtol=1e-4)
    assert np.abs(gradient).max() > 0
    expected = plain_loss(packed.items, tokens, **options)[1]
    for name, value in expected.items():
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert options.get("clip", 0.5) > 1 or 0 < expected["clipfrac/policy"] < 1


def run_values(packed, tokens, **settings):
    """Return the loss and its gradient by the values."""
    loss = get_loss({"name": "ppo"} | settings)
    placed = {name: jnp.asarray(packed.place(values)) for name, values in tokens.items()}

    def run(values):
        inputs = LossInputs(**(placed | {"values": values}))
        inputs = inputs.replace(statistics=loss.measure(inputs, packed.batch))
        return loss(inputs, packed.batch)[0]

    return jax.value_and_grad(run)(placed["values"])


def test_the_critic_learns_the_discounted_reward(draw, differentiate):
    packed, tokens = draw(1)

    def formula(values):
        return plain_loss(packed.items, tokens | {"values": values}, critic=0.5)[0]

    _, gradient = run_values(packed, tokens, critic_coef=0.5)
    slopes = packed.place(differentiate(formula, tokens["values"]))
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)


def test_empty_responses_and_equal_advantages_give_finite_gradients(draw, pack):
    packed, tokens = draw()
    empty = np.zeros(0, np.int32)
    items = [dataclasses.replace(packed.items[0], responses=(empty,)), *packed.items[1:]]
    tokens = {name: [(np.zeros(0),), *values[1:]] for name, values in tokens.items()}
    for kept in (len(items), 1):  # one empty response; nothing else in the step
        part = pack.of(items[:kept])
        _, gradient = run_values(part, {name: values[:kept] for name, values in tokens.items()})
        assert np.isfinite(gradient).all()
    same = [dataclasses.replace(x, rewards=(0.0,) * len(x.rewards)) for x in packed.items]
    zeros = [tuple(np.zeros(len(r)) for r in x.responses) for x in same]
    drawn = draw()[1] | {"old_values": zeros}
    value, gradient = run_values(pack.of(same), drawn, KL_coef=0.0, critic_coef=0.0)
    assert value == 0 and not np.asarray(gradient).any()


def test_rewards_far_from_zero_are_whitened_as_well_as_others(draw):
    packed, tokens = draw(2, shift=100.0)
    value, _ = run_values(packed, tokens, critic_coef=0.0)
    np.testing.assert_allclose(value, plain_loss(packed.items, tokens, critic=0.0)[0], rtol=1e-3)


def test_shares_may_be_one_and_not_more():
    assert check_loss({"name": "ppo", "gamma": 1.0, "lam": 0}) == []
    assert check_loss({"name": "ppo", "gamma": 1.01, "lam": -0.1}) == [
        "loss.gamma: got 1.01, allowed: 0 or more, 1 at most",
        "loss.lam: got -0.1, allowed: 0 or more, 1 at most",
    ]
