"""Every loss in a whole step: no packing, padding, microbatch or device changes what it trains.

The losses are those of the registry: a new one is tested without a word here, a new kind of items
needs its roles below.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.losses import get_loss, list_losses
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from halos_jax.models.value import abstract_value_params, init_value_params
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.packing.token_values import Collected
from halos_jax.training import step as steps
from halos_jax.training.teacher import Teacher
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item

VOCAB = 31
TINY = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=16,
    init_std=0.2,
    head_chunk=7,
)
ROLES = {
    "pair": (CHOSEN, REJECTED),
    "target": (TARGET,),
    "controlled": (TARGET,),
    "unpaired": (TARGET, MISMATCHED),
    "group": (MEMBER,) * 3,
    "answer": (MEMBER,) * 2,
    "output": (TARGET,),
}
KINDS = list(ROLES)
LOSSES = {name: get_loss({"name": name}) for name in list_losses()}
CASES = [
    (name, humanline)
    for name, loss in LOSSES.items()
    for humanline in (False, True)
    if not humanline or loss.reference or loss.old
]
COUNT = 7  # items of a step; one row of eight is padding alone
EDGES = ("empty responses", "the good alone", "the bad alone", "one item", "one empty item")
# Two steps that differ in everything: microbatches of one tight row on one device, and an item a
# row, with padding, on eight devices.
PACKINGS = {
    "microbatches": {"num_rows": 1, "microbatches": 4, "row_multiple": 8},
    "devices": {"num_rows": COUNT + 1, "microbatches": 1, "row_multiple": 32},
}


def draw_items(kind: str, edge: str | None) -> list[Item]:
    """Draw the items of one step; of an edge, items as bad as they come, with equal scores."""
    rng = np.random.default_rng(KINDS.index(kind))
    draw = lambda high: rng.integers(1, VOCAB, rng.integers(1, high)).astype(np.int32)  # noqa: E731
    roles, items = ROLES[kind], []
    for number in range(COUNT):
        responses = tuple(draw(8) for _ in roles)
        if edge == "one empty item" or (edge == "empty responses" and number == 0):
            responses = tuple(part[:0] for part in responses)
        if edge == "empty responses" and number == 1:
            responses = (responses[0][:0], *responses[1:])
        scores = rng.normal(size=len(roles)) if edge is None else np.full(len(roles), 0.3)
        items.append(
            Item(
                draw(5),
                responses,
                roles,
                rewards=tuple(map(float, scores)),
                weight=1.0 + number % 2,
                desirable=number % 3 > 0 if edge is None else edge != "the bad alone",
            )
        )
    return items


@functools.cache
def plan_steps(packing: str):
    """Return (items, their token log-probs elsewhere, plan, step of each kind and edge).

    It is one plan for all, so that all steps have one shape.
    """
    wanted = dict(PACKINGS[packing])
    microbatches = wanted.pop("microbatches")
    keys = [(kind, edge) for kind in KINDS for edge in (None, *EDGES)]
    items = [item for key in keys for item in draw_items(*key)]
    for tokens in range(400, 0, -1):
        plan = plan_batches(items, batch_size=COUNT, tokens_per_row=tokens, **wanted)
        if plan.layout.microbatches == microbatches:
            break
    made = []
    for number, (_, edge) in enumerate(keys):
        first, alone = number * COUNT, edge in ("one item", "one empty item")
        made.append(
            tuple(
                tuple(index for index in row if index == first or not alone)
                for row in plan.steps[number]
            )
        )
    rng = np.random.default_rng(9)
    # Around those of a policy that knows nothing, so that some ratios are clipped and some not.
    logps = [
        tuple(rng.normal(-np.log(VOCAB), 0.7, len(r)).astype(np.float32) for r in item.responses)
        for item in items
    ]
    return items, logps, dataclasses.replace(plan, steps=tuple(made)), keys


def family(loss) -> tuple:
    """Return what losses have in common that one program can serve."""
    return loss.needs, loss.value, loss.divergence is not None


def case_loss(name: str, humanline: bool):
    return get_loss({"name": name} | ({"humanline": True} if humanline else {}))


@functools.cache
def model_of(family: tuple):
    """Return (decoder config, params) of the model that a family of losses reads."""
    config = dataclasses.replace(TINY, num_labels=int(family[0] == "scores"))
    params = init_params(jax.random.key(0), config)
    if family[1]:
        value = init_value_params(jax.random.key(1), config.d_model)
        params["value"] = value | {"third": jax.random.normal(jax.random.key(2), (16, 1))}
    return config, jax.tree.map(np.asarray, params)


@functools.cache
def make_teacher() -> Teacher:
    """Return a teacher of another width, whose last rows no token has."""
    config = dataclasses.replace(TINY, d_model=24, num_layers=2)
    params = jax.tree.map(np.asarray, init_params(jax.random.key(3), config))
    return Teacher(params, config, words=VOCAB - 2)


@pytest.fixture(scope="module")
def run_case(choose):
    """Return the function from (name, humanline, edge, packing) to a step's loss and gradient."""

    @functools.cache
    def compile_family(family, config):
        losses = [case_loss(*case) for case in CASES if case[0] in FAMILIES[family]]

        def run(index, params, batch, teacher):
            loss = choose(losses, index)
            value, gradient, _ = steps.loss_and_gradient(params, None, batch, loss, config, teacher)
            return value, gradient

        return jax.jit(run)

    def run(name, humanline, edge, packing):
        kind = family(LOSSES[name])
        config, params = model_of(kind)
        cases = [case for case in CASES if case[0] in FAMILIES[kind]]
        items, logps, plan, keys = plan_steps(packing)
        step = keys.index((LOSSES[name].items, edge))
        # With a value head, what it said before, and the noise of its dropout, stand in the batch.
        old = Collected(logps, logps, seed=step) if LOSSES[name].value else None
        batch = build_batch(items, plan, step, reference_logps=logps, old=old)
        sizes = (2, 2, 2) if packing == "devices" else (1, 1, 1)
        mesh = jax.make_mesh(
            sizes,
            sharding.MESH_AXES,
            (AxisType.Auto,) * 3,
            devices=jax.devices()[: int(np.prod(sizes))],
        )
        with jax.set_mesh(mesh):
            placed = params_shardings(config, mesh)
            if "value" in params:
                head = abstract_value_params(config.d_model, mesh)
                placed["value"] = {name: leaf.sharding for name, leaf in head.items()}
            params = jax.device_put(params, placed)
            batch = sharding.put_batch(batch, mesh, leading=1)
            index, teacher = cases.index((name, humanline)), None
            if LOSSES[name].divergence is not None:
                teacher = make_teacher()
                placed = params_shardings(teacher.config, mesh)
                teacher = teacher.replace(params=jax.device_put(teacher.params, placed))
            return jax.device_get(compile_family(kind, config)(index, params, batch, teacher))

    return run


FAMILIES = {
    one: [name for name, loss in LOSSES.items() if family(loss) == one]
    for one in {family(loss) for loss in LOSSES.values()}
}


@pytest.mark.parametrize(("name", "humanline"), CASES)
def test_loss_and_gradient_are_one_for_every_packing_and_mesh(run_case, name, humanline):
    value, gradient = run_case(name, humanline, None, "microbatches")
    other_value, other = run_case(name, humanline, None, "devices")
    np.testing.assert_allclose(other_value, value, rtol=2e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert scale > 1e-4
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)


@pytest.mark.parametrize(("name", "humanline"), CASES)
def test_a_step_at_the_edge_gives_finite_gradients(run_case, name, humanline):
    for edge in EDGES:
        for leaf in jax.tree.leaves(run_case(name, humanline, edge, "devices")):
            assert np.isfinite(leaf).all(), edge
