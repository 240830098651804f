"""The registry: what it refuses and how it says so, what it binds, what a loss is divided by.

And what holds for every loss in it: neither packing nor microbatches nor devices matter.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.losses import (
    LossInputs,
    LossTerms,
    check_loss,
    get_loss,
    list_losses,
    registry,
)
from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET

ROLES = {
    "pair": (CHOSEN, REJECTED),
    "target": (TARGET,),
    "controlled": (TARGET,),
    "unpaired": (TARGET, MISMATCHED),
    "group": (MEMBER,) * 4,
    "answer": (MEMBER,) * 2,
    "output": (TARGET,),
}


@pytest.fixture
def register(monkeypatch):
    """Return `register` on a copy of the registry that is gone after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return registry.register


def test_every_loss_of_this_stage_is_there():
    assert list_losses() == sorted(list_losses())
    assert {"dpo", "sft", "bradley-terry"} <= set(list_losses())
    for name in list_losses():
        assert check_loss({"name": name}) == []
        assert get_loss({"name": name}).name == name


@pytest.mark.parametrize("name", ["dpoo", None, 3, ["dpo"], ""])
def test_an_unknown_loss_lists_the_known(name):
    settings = {} if name is None else {"name": name}
    (line,) = check_loss(settings)
    assert line.startswith(f"loss.name: got {name!r}, allowed: ")
    assert "bradley-terry, " in line and ", dpo, " in line and line.endswith(", sum")
    with pytest.raises(ValueError, match=r"loss\.name: got"):
        get_loss(settings)


def test_all_errors_of_the_parameters_are_listed():
    allowed = "beta, humanline, log_epsilon_P, log_epsilon_R, correction, correction_cap"
    lines = check_loss({"name": "dpo", "bta": 0.1, "zzz": 1, "beta": "0.1"})
    assert lines == [
        f"loss.bta: 'dpo' has no such parameter; did you mean 'beta'; allowed: {allowed}",
        f"loss.zzz: 'dpo' has no such parameter; allowed: {allowed}",
        "loss.beta: got '0.1', allowed: a finite number",
    ]
    assert check_loss({"name": "sft", "beta": 1.0}) == [
        "loss.beta: 'sft' has no such parameter; allowed: none"
    ]


@pytest.mark.parametrize("value", [True, None, "x", (0.1,), float("nan"), float("inf")])
def test_a_value_of_another_type_is_refused(value):
    (line,) = check_loss({"name": "dpo", "beta": value})
    assert line.startswith(f"loss.beta: got {value!r}, allowed: a finite number")


def test_whole_numbers_and_switches_are_accepted_where_they_fit(register):
    @register("switched")
    def switched(inputs, batch, *, scale: float = 1.0, on: bool = False):
        return LossTerms(jnp.float32(scale if on else 0), {})

    assert check_loss({"name": "switched", "scale": 2, "on": True}) == []
    assert len(check_loss({"name": "switched", "on": 1})) == 1


def test_a_name_is_taken_once(register):
    with pytest.raises(ValueError, match="'dpo' is registered already"):

        @register("dpo")
        def another(inputs, batch):
            return LossTerms(jnp.zeros(()), {})

    assert get_loss({"name": "dpo"}).reference


def test_parameters_are_bound_and_the_registered_loss_is_left_alone(register, pack):
    @register("constant", per="token", items="target")
    def constant(inputs, batch, *, value: float = 1.0):
        return LossTerms(jnp.float32(value), {"some/metric": (jnp.float32(3), jnp.float32(2))})

    packed = pack((CHOSEN, REJECTED))
    bound = get_loss({"name": "constant", "value": 5.0})
    assert (bound.per, bound.items, bound.needs, bound.reference) == (
        "token",
        "target",
        "logps",
        False,
    )
    for loss, value in ((bound, 5.0), (get_loss({"name": "constant"}), 1.0)):
        share, metrics = loss(LossInputs(), packed.batch)
        np.testing.assert_allclose(share, value / packed.batch.num_tokens)
        assert metrics["some/metric"] == (3, 2)
        assert metrics["loss"] == (share, 1)


def test_a_loss_per_example_is_divided_by_the_weights_of_the_step(register, pack):
    @register("four")
    def four(inputs, batch):
        return LossTerms(jnp.float32(4), {})

    packed = pack((CHOSEN, REJECTED), weights=True)
    share, _ = get_loss({"name": "four"})(LossInputs(), packed.batch)
    np.testing.assert_allclose(share, 4 / sum(item.weight for item in packed.items))


def test_humanline_is_refused_with_the_reason_where_there_is_no_log_ratio():
    for name in list_losses():
        loss = get_loss({"name": name})
        lines = check_loss({"name": name, "humanline": True})
        if loss.reference or loss.old:
            assert lines == []
            assert get_loss({"name": name, "humanline": True}).clamp == (-1.0, 1.5)
            assert get_loss({"name": name, "humanline": False}).clamp is None
        else:
            (line,) = lines
            assert line.startswith(f"loss.humanline: {name!r} has no log-ratio to clamp")
    (line,) = check_loss({"name": "dpo", "humanline": True, "log_epsilon_P": 2.0})
    assert line == "loss.log_epsilon_P: got 2.0, allowed: less than log_epsilon_R=1.5"


def test_a_sum_adds_values_gradients_and_metrics(pack, draw_logps):
    packed = pack((CHOSEN, REJECTED), weights=True)
    reference = packed.place(draw_logps(packed, 2))
    policy = jnp.asarray(packed.place(draw_logps(packed, 1)))

    def run(settings):
        loss = get_loss(settings)
        return jax.value_and_grad(
            lambda x: loss(LossInputs(policy=x, reference=reference), packed.batch), has_aux=True
        )(policy)

    parts = {"dpo": {"weight": 0.5, "beta": 0.3}, "nll": {"weight": 2}}
    (value, metrics), gradient = run({"name": "sum", **parts})
    (dpo, dpo_metrics), dpo_gradient = run({"name": "dpo", "beta": 0.3})
    (nll, _), nll_gradient = run({"name": "nll"})
    np.testing.assert_allclose(value, 0.5 * dpo + 2 * nll, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.5 * dpo_gradient + 2 * nll_gradient, atol=1e-7)
    for name, each in (("dpo", dpo), ("nll", nll)):
        total, count = metrics[f"loss/{name}"]
        assert count == packed.batch.num_examples
        np.testing.assert_allclose(total / count, each, rtol=1e-6)
    assert metrics["rewards/margins"] == dpo_metrics["rewards/margins"]
    assert get_loss({"name": "sum", **parts}).reference
    # DPO with an SFT term has a name of its own.
    (rpo, _), _ = run({"name": "rpo", "beta": 0.3, "alpha": 2.0})
    np.testing.assert_allclose(rpo, dpo + 2 * nll, rtol=1e-6)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "loss: 'sum' got no losses to add; set loss.dpo.weight=1, say"),
        ({"dpo": 1.0}, "loss.dpo: got 1.0, allowed: a section: weight, and parameters"),
        ({"dpo": {"weight": "1"}}, "loss.dpo.weight: got '1', allowed: a finite number"),
        ({"dpo": {"beta": "1"}}, "loss.dpo.beta: got '1', allowed: a finite number"),
        ({"dpa": {}}, "loss.dpa.name: got 'dpa', allowed: "),
        ({"sum": {"dpo": {}}}, "loss.sum.name: got 'sum', allowed: "),
        (
            {"dpo": {}, "sft": {}},
            "loss: 'sum' got losses of different examples (dpo pair, sft target), allowed: of one",
        ),
    ],
)
def test_what_cannot_be_summed_is_refused(parts, line):
    (got,) = check_loss({"name": "sum", **parts})
    assert got.startswith(line)


def run_step(loss, items, tokens, *, num_rows, tokens_per_row, place=lambda x: x):
    """Return microbatches, value, metrics and gradient (by item) of a step over given log-probs."""
    plan = plan_batches(
        items,
        batch_size=len(items),
        num_rows=num_rows,
        tokens_per_row=tokens_per_row,
        row_multiple=8,
    )
    batch = place(build_batch(items, plan, 0))
    policy, other, values = (
        place(build_batch(items, plan, 0, reference_logps=tokens[name]).reference_logps)
        for name in ("policy", "other", "values")
    )

    def total(policy):
        inputs = (
            LossInputs(scores=policy[..., : batch.sequences.role.shape[-1]])
            if loss.needs == "scores"
            else LossInputs(
                policy=policy,
                reference=other,
                old=other,
                values=policy + values,
                old_values=values,
                entropies=-other,
                divergences=(policy - other) ** 2,
                teacher=other,
                sampled=other + 0.3 * values,
                alignment=values - other,
            )
        )
        parts = jax.vmap(loss.measure)(inputs, batch)
        inputs = dataclasses.replace(
            inputs,
            statistics={
                name: tuple(jnp.broadcast_to(x.sum(), x.shape) for x in part)
                for name, part in parts.items()
            },
        )
        shares, sums = jax.vmap(loss)(inputs, batch)
        return shares.sum(), sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(policy)
    metrics = {name: np.sum(a) / max(np.sum(b), 1) for name, (a, b) in sums.items()}
    found = dict(split_logps(plan, 0, items, np.asarray(gradient)))
    return plan.layout.microbatches, value, metrics, [found[i] for i in range(len(items))]


CORRECTED = {
    "dpo": ("wpo", "token_tis", "sequence_tis"),
    "kto": ("wpo",),
    "dapo": ("token_tis", "sequence_tis"),
    "gspo": ("token_tis",),
    "ppo": ("sequence_tis",),
}


@pytest.mark.parametrize(
    ("name", "correction"),
    [(n, "none") for n in list_losses() if get_loss({"name": n}).needs == "logps"]
    + [(name, mode) for name, modes in CORRECTED.items() for mode in modes],
)
def test_packing_microbatches_and_devices_do_not_matter(pack, draw_logps, mesh, name, correction):
    loss = get_loss({"name": name, "correction": correction})
    rng = np.random.default_rng(3)
    items = [
        dataclasses.replace(
            item,
            desirable=bool(index % 3),
            rewards=tuple(map(float, rng.normal(size=len(item.roles)))),
        )
        for index, item in enumerate(pack(ROLES[loss.items], count=16, weights=True).items)
    ]
    packed = pack.of(items)
    tokens = {"policy": draw_logps(packed, 1)}
    tokens["other"] = [
        tuple(part + 0.2 * rng.normal(size=len(part)) for part in parts)
        for parts in tokens["policy"]
    ]
    tokens["values"] = draw_logps(packed, 2)
    count, value, metrics, gradient = run_step(loss, items, tokens, num_rows=1, tokens_per_row=4096)
    assert count == 1
    sizes = [item.num_tokens for item in items]
    count, *others = run_step(
        loss,
        items,
        tokens,
        num_rows=4,  # a row for each pair of devices
        tokens_per_row=max(sum(sizes) // 16 + 2, max(sizes)),
        place=lambda x: sharding.put_batch(x, mesh, leading=1),
    )
    assert count >= 2
    np.testing.assert_allclose(others[0], value, rtol=1e-5)
    for key in metrics.keys() - {"loss"}:
        np.testing.assert_allclose(others[1][key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)
    scale = max(np.abs(part).max(initial=0) for parts in gradient for part in parts)
    for ours, theirs in zip(others[2], gradient, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * scale)
    assert scale > 0
