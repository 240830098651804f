"""Clipped losses with a KL term: against TRL, against their formulas, by aggregation."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, check_loss, check_reference, get_loss, list_losses
from halos_jax.types import MEMBER, Item
from tests.losses.trl_cases import LONGEST, STREAMS, TRL, draw_case, run_trl

NAMES = [name for name in list_losses() if get_loss({"name": name}).penalty]
KL = {"beta": 0.1}


def pack_case(pack, weights=(1.0, 1.0, 1.0)):
    """Return the packed items of `draw_case` and its streams as token values."""
    groups = draw_case()
    items = [
        Item(
            np.arange(1, 4, dtype=np.int32),
            tuple(np.full(len(part), 7, np.int32) for part in drawn["old"]),
            (MEMBER,) * 4,
            tuple(map(float, rewards)),
            weight=weight,
        )
        for (drawn, rewards), weight in zip(groups, weights, strict=True)
    ]
    return pack.of(items), {
        name: [tuple(drawn[name]) for drawn, _ in groups] for name in (*STREAMS, "sampled")
    }


# --------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("case", TRL)
def test_values_and_gradients_are_those_of_trl(pack, case):
    settings, _, expected = TRL[case]
    packed, tokens = pack_case(pack)
    loss = get_loss({**settings, "sample_deviation": True})
    placed = {name: jnp.asarray(packed.place(tokens[name])) for name in tokens}
    assert not loss.penalty or loss.reference == bool(settings.get("beta", "clip" in loss.name))

    def run(policy):
        return loss(LossInputs(**placed | {"policy": policy}), packed.batch)[0]

    value, gradient = jax.value_and_grad(run)(placed["policy"])
    found = (value, np.abs(gradient).sum(), np.sqrt(np.square(gradient).sum()))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("case", TRL)
def test_the_numbers_above_are_what_the_installed_trl_gives(case):
    _, theirs, expected = TRL[case]
    np.testing.assert_allclose(run_trl(**theirs), expected, rtol=1e-9)


# --------------------------------------------------------------------------- formulas


def gate(ratio, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    return advantage * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))


# name -> gain of (ratio, advantage, log-prob, ratio without gradient), a token
GAINS = {
    "grpo_clip": lambda rho, a, p, still: np.minimum(a * rho, a * np.clip(rho, 0.8, 1.2)),
    "cispo": lambda rho, a, p, still: a * np.clip(still, 0, 5) * p,
    "sapo": lambda rho, a, p, still: gate(rho, a),
}


def make_formula(name, packed, tokens, *, aggregation, humanline=False, unbiased=False):
    """Return the loss with beta = 0.1 as a float64 function of the policy."""
    num_tokens = sum(len(response) for item in packed.items for response in item.responses)
    total = sum(item.weight for item in packed.items)

    def ratio_of(p, o):
        return np.exp(np.clip(p - o, -1.0, 1.5) if humanline else p - o)

    def formula(policy):
        value = 0.0
        for number, item in enumerate(packed.items):
            advantages = np.array(item.rewards) - np.mean(item.rewards)
            advantages = advantages / (np.std(item.rewards) + 1e-4)
            for copy, advantage in enumerate(advantages):
                p = policy[number][copy]
                o, r, now = (tokens[x][number][copy] for x in ("old", "reference", "policy"))
                rho = ratio_of(p, o)
                kl = np.exp(r - p) - (r - p) - 1
                each = 0.1 * kl * (rho if unbiased else 1)
                each = each - GAINS[name](rho, advantage, p, ratio_of(now, o))
                if aggregation == "token":
                    value += item.weight * each.sum() / num_tokens
                else:
                    length = len(p) if aggregation == "sequence" else LONGEST
                    value += item.weight * each.sum() / length / len(advantages) / total
        return value

    return formula


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_formula(pack, compare, name, aggregation):
    packed, tokens = pack_case(pack, weights=(1.0, 3.0, 2.0))
    del tokens["sampled"]
    for options in ({}, {"humanline": True}, {"unbiased_kl": True}):
        settings = {"name": name, "aggregation": aggregation, **KL, **options}
        if aggregation == "constant":
            settings["max_tokens"] = LONGEST
        formula = make_formula(
            name,
            packed,
            tokens,
            aggregation=aggregation,
            humanline="humanline" in options,
            unbiased="unbiased_kl" in options,
        )
        loss = get_loss(settings)
        assert loss.per == ("token" if aggregation == "token" else "example")
        _, metrics, _ = compare(packed, settings, tokens, formula)
        gaps = [
            np.concatenate(r) - np.concatenate(p)
            for r, p in zip(tokens["reference"], tokens["policy"], strict=True)
        ]
        gap = np.concatenate(gaps)
        if not options:
            np.testing.assert_allclose(
                metrics["rewards/KL"], ((np.exp(gap) - gap - 1).sum(), len(gap)), rtol=1e-4
            )


def test_the_share_of_clipped_tokens_is_that_of_trl(pack):
    packed, tokens = pack_case(pack)
    inputs = LossInputs(**{name: packed.place(tokens[name]) for name in STREAMS})
    expected = {"grpo_clip": 0, "cispo": 0}
    for number, item in enumerate(packed.items):
        advantages = np.array(item.rewards) - np.mean(item.rewards)
        for copy, advantage in enumerate(advantages):
            rho = np.exp(tokens["policy"][number][copy] - tokens["old"][number][copy])
            outside = rho > 1.2 if advantage > 0 else rho < 0.8
            expected["grpo_clip"] += outside.sum()
            expected["cispo"] += (rho > 1.3).sum()
    for name, count in expected.items():
        settings = {"name": name} | ({"epsilon_high": 0.3} if name == "cispo" else {})
        _, metrics = get_loss(settings)(inputs, packed.batch)
        assert 0 < count < packed.batch.num_tokens
        assert metrics["clipfrac/policy"] == (count, packed.batch.num_tokens), name


# --------------------------------------------------------------------------- their settings


def test_without_a_kl_term_no_reference_is_read(pack):
    packed, tokens = pack_case(pack)
    inputs = LossInputs(**{name: packed.place(tokens[name]) for name in ("policy", "old")})
    for name in NAMES:
        without, with_term = (get_loss({"name": name, "beta": beta}) for beta in (0.0, 0.04))
        assert (without.reference, with_term.reference) == (False, True)
        assert without.old and with_term.old
        value, metrics = without(inputs, packed.batch)
        assert np.isfinite(value) and "rewards/KL" not in metrics
        # Nor is a KL term of 0 reported where another loss of a sum has read the reference.
        both = inputs.replace(reference=packed.place(tokens["reference"]))
        found = get_loss({"name": "sum", name: {"beta": 0.0}, "grpo": {}})(both, packed.batch)[1]
        alone = get_loss({"name": "grpo"})(both, packed.batch)[1]
        assert found["rewards/KL"][0] == alone["rewards/KL"][0] > 0
        (line,) = check_reference({"name": name, "beta": 0.0}, "round_start", task="online")
        assert line.startswith(
            f"rounds.reference: got 'round_start', but loss {name!r} with beta=0 has no reference"
        )
        assert check_reference({"name": name, "beta": 0.04}, "round_start", task="online") == []
    assert {name: get_loss({"name": name}).reference for name in NAMES} == {
        "cispo": False,
        "grpo_clip": True,
        "sapo": False,
    }


def test_what_has_no_effect_or_is_no_choice_is_refused():
    assert check_loss({"name": "grpo_clip", "aggregation": "mean"}) == [
        "loss.aggregation: got 'mean', allowed: 'token', 'sequence', 'constant'"
    ]
    assert check_loss({"name": "cispo", "max_tokens": 64}) == [
        "loss.max_tokens: got 64, which has no effect with aggregation='token'; leave it out, or "
        "set --config.loss.aggregation=constant"
    ]
    assert check_loss({"name": "sapo", "unbiased_kl": True}) == [
        "loss.unbiased_kl: got True, which has no effect with beta=0; leave it out, or set "
        "--config.loss.beta=0.04"
    ]
    assert check_loss({"name": "dr_grpo", "max_tokens": 64}) == []
    (line,) = check_loss({"name": "grpo_clip", "epsilon_low": 1.5})
    assert line.startswith("loss.epsilon_low: got 1.5, allowed: 0 or more, less than 1")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("case", ["equal scores", "empty response", "on policy", "alone"])
def test_gradients_are_finite_at_the_edges(pack, name, beta, case):
    packed, tokens = pack_case(pack)
    items = packed.items
    if case == "equal scores":
        items = [dataclasses.replace(item, rewards=(0.3,) * 4) for item in items]
    if case == "alone":
        items = [
            dataclasses.replace(
                item, responses=item.responses[:1], roles=item.roles[:1], rewards=(1.0,)
            )
            for item in items
        ]
        tokens = {key: [parts[:1] for parts in values] for key, values in tokens.items()}
    if case == "empty response":
        none = np.zeros(0, np.int32)
        items[0] = dataclasses.replace(items[0], responses=(none, *items[0].responses[1:]))
        tokens = {
            key: [(np.zeros(0), *values[0][1:]), *values[1:]] for key, values in tokens.items()
        }
    packed = pack.of(items)
    placed = {key: jnp.asarray(packed.place(tokens[key])) for key in STREAMS}
    if case == "on policy":
        placed = dict.fromkeys(STREAMS, placed["policy"])
    loss = get_loss({"name": name, "beta": beta, "sample_deviation": True})
    run = lambda x: loss(LossInputs(**placed | {"policy": x}), packed.batch)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(run)(placed["policy"])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if case in ("equal scores", "alone") and not beta:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if case == "on policy":  # the KL term is at its minimum: what is left is the policy gradient
        plain = get_loss({"name": name, "beta": 0.0, "sample_deviation": True})
        run = lambda x: plain(LossInputs(**placed | {"policy": x}), packed.batch)[0]  # noqa: E731
        np.testing.assert_allclose(gradient, jax.grad(run)(placed["policy"]), atol=1e-7)
