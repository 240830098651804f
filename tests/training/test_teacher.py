"""A step that compares the policy with a teacher, against dense distributions of both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.bench.workloads import CASES, make_decoder
from halos_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from halos_jax.losses import get_loss
from halos_jax.models.lora import Adapter, Frozen, Module
from halos_jax.models.spec import init_params, params_shardings
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.training import loop, memory
from halos_jax.training import step as steps
from halos_jax.training.teacher import Teacher
from halos_jax.types import TARGET, Item
from tests.logits import compute_logits
from tests.training import conftest
from tests.training.test_memory import make_setting

WORDS = 90  # of 96 rows, which the tensor axis divides
TINY = dataclasses.replace(conftest.TINY, vocab_size=96)
WIDE = dataclasses.replace(TINY, d_model=40, num_layers=3)
BETA, HEAT = 0.5, 0.8  # every beta: tests/models/test_divergence.py


def draw_items(seed=0, count=16):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, WORDS, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    return [
        Item(draw(1, 9), (draw(1, 20),), (TARGET,), weight=1.0 + number % 2)
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), TINY))


def make_teacher(config=WIDE, seed=7):
    params = jax.tree.map(np.asarray, init_params(jax.random.key(seed), config))
    return Teacher(params, config, WORDS)


@functools.partial(jax.jit, static_argnames=("beta", "temperature"))
def dense_loss(params, teacher, *, beta, temperature):
    """Return the loss on the items by the definition, with all distributions formed."""
    items = draw_items()
    rows = [np.concatenate([item.prompt_ids, *item.responses]) for item in items]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    weights = np.zeros((len(rows), tokens.shape[1] - 1))
    for number, (row, item) in enumerate(zip(rows, items, strict=True)):
        tokens[number, : len(row)] = row
        weights[number, len(item.prompt_ids) - 1 : len(row) - 1] = item.weight

    def describe(params, config):
        lengths = jnp.array([len(row) for row in rows])
        logits = compute_logits(params, tokens, lengths, config)[:, :-1, :WORDS]
        return jax.nn.log_softmax(logits / temperature)

    def kl(p, q):
        return (jnp.exp(p) * (p - q)).sum(axis=-1)

    s, t = describe(params, TINY), describe(teacher.params, teacher.config)
    m = jnp.log((1 - beta) * jnp.exp(s) + beta * jnp.exp(t))
    values = {0.0: kl(t, s), 1.0: kl(s, t)}.get(beta, beta * kl(t, m) + (1 - beta) * kl(s, m))
    return (jnp.where(weights > 0, values, 0) * weights).sum() / (weights > 0).sum()


@functools.partial(jax.jit, static_argnames="beta")
def differentiate(params, frozen, batch, teacher, beta):
    loss = get_loss({"name": "gkd", "beta": beta, "temperature": HEAT})
    return steps.loss_and_gradient(params, frozen, batch, loss, TINY, teacher)


def run_step(params, beta, teacher, *, mesh=None, tokens_per_row=4096, frozen=None):
    items, num_rows = draw_items(), 1 if mesh is None else 4
    plan = plan_batches(
        items, batch_size=len(items), num_rows=num_rows, tokens_per_row=tokens_per_row
    )
    batch = build_batch(items, plan, 0)
    if mesh is not None:
        batch = sharding.put_batch(batch, mesh, leading=1)
    value, gradient, sums = differentiate(params, frozen, batch, teacher, beta)
    return plan.layout.microbatches, value, gradient, sums


def test_the_step_is_that_of_dense_distributions(params, one):
    teacher = make_teacher()
    _, value, gradient, _ = run_step(params, BETA, teacher)
    dense = jax.value_and_grad(dense_loss)
    expected, slopes = dense(params, teacher, beta=BETA, temperature=HEAT)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5 * scale)


def make_adapter(params):
    """Return an adapter on `params` as the base, and its arrays, none of them zero."""
    adapter = Adapter(2, 4.0, (Module("self_attn.q_proj", ("q",)), Module("mlp.up_proj", ("up",))))
    rng, layers = np.random.default_rng(3), {}
    for module in adapter.modules:
        (path,) = module.paths
        count, width, *rest = params["layers"][path].shape
        layers[module.a_name] = rng.normal(size=(count, width, 2)).astype(np.float32)
        layers[f"{path}_lora_b"] = rng.normal(size=(count, 2, *rest)).astype(np.float32)
    return Frozen(params, adapter), {"layers": layers}


@pytest.mark.parametrize("lora", [False, True])
def test_packing_microbatches_and_devices_do_not_matter(params, mesh, lora):
    teacher = make_teacher()
    frozen, trained = make_adapter(params) if lora else (None, params)
    one = jax.make_mesh((1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1])
    with jax.set_mesh(one):
        count, value, gradient, sums = run_step(trained, BETA, teacher, frozen=frozen)
    assert count == 1
    placed = params_shardings(TINY, mesh)
    if lora:
        frozen = dataclasses.replace(frozen, base=jax.device_put(frozen.base, placed))
    else:
        trained = jax.device_put(trained, placed)
    there = jax.device_put(teacher.params, params_shardings(WIDE, mesh))
    count, *others = run_step(
        trained,
        BETA,
        teacher.replace(params=there),
        mesh=mesh,
        tokens_per_row=40,
        frozen=frozen,
    )
    assert count >= 2
    np.testing.assert_allclose(others[0], value, rtol=2e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for ours, theirs in zip(jax.tree.leaves(others[1]), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5 * scale)
    for name in sums.keys() - {"loss"}:
        np.testing.assert_allclose(others[2][name], sums[name], rtol=1e-4, err_msg=name)


def test_a_policy_that_is_its_teacher_learns_nothing(params, one):
    _, value, gradient, sums = run_step(params, BETA, Teacher(params, TINY, WORDS))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(sums["rewards/log_ratio"][0], 0, atol=1e-4)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=3e-6)


def test_training_brings_the_policy_to_its_teacher(params, one):
    items, teacher = draw_items(), make_teacher()
    config = Config(
        progress=False,
        train=TrainConfig(batch_size=16, eval_every=0, row_multiple=64, tokens_per_device=512),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_fraction=0.0),
    )
    loss = get_loss({"name": "gkd", "beta": 1.0, "temperature": HEAT})
    trainer = loop.make_trainer(config, TINY, loss, one, total_steps=20, teacher=teacher)
    state = loop.start_state(trainer, jax.tree.map(jnp.asarray, params))
    dataset = loop.make_dataset(trainer, items, seed=0, epochs=20)
    state = loop.run_steps(trainer, state, dataset, held_out=None, writer=Silent())
    before, after = (
        dense_loss(x, teacher, beta=1.0, temperature=HEAT) for x in (params, state.params)
    )
    assert after < 0.3 * before
    held_out = loop.make_dataset(trainer, items, seed=None)
    found = loop.evaluate(trainer, state.params, held_out)
    np.testing.assert_allclose(found["loss/eval"], after, rtol=1e-4)


class Silent:
    """Stands in for the metric writer."""

    def write(self, step, metrics):
        pass


def test_a_trainer_has_a_teacher_if_and_only_if_its_loss_has(one):
    config, teacher = Config(), make_teacher()
    for name, given, said in (("gkd", None, "no"), ("dpo", teacher, "a")):
        with pytest.raises(RuntimeError, match=f"loss '{name}' got {said} teacher"):
            loop.make_trainer(
                config, TINY, get_loss({"name": name}), one, total_steps=1, teacher=given
            )


def test_a_teacher_takes_memory_from_what_is_kept(mesh1):
    decoder, batch, state = make_setting(mesh1, model="1b", examples=16)
    large = make_decoder(CASES["dpo_8b_full"], ModelConfig(params_dtype="bfloat16"))
    teacher = Teacher({}, large, large.vocab_size)
    found = memory._count_teacher(decoder, batch, mesh1, teacher)
    assert memory._count_teacher(decoder, batch, mesh1, None) == 0
    # 8.03 billion params in bfloat16, 16 x 1024 states of 4096 numbers, three logits of a chunk.
    expected = 8.03e9 * 2 + 16 * 1024 * 4096 * 2 + 3 * 4 * 128256 * decoder.head_chunk
    assert found == pytest.approx(expected, rel=2e-3)
    limit = 60 * 2**30
    alone = memory.choose_remat(decoder, batch, state, mesh1, limit=limit)
    beside = memory.choose_remat(decoder, batch, state, mesh1, limit=limit, teacher=teacher)
    order = memory._REMATS
    assert (order.index(alone.remat), alone.head_remat) < (
        order.index(beside.remat),
        beside.head_remat,
    )
