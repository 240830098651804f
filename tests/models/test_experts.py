"""Experts against loops in float64; the same on any mesh, for any load and in any company."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.models import decoder, spec
from halos_jax.models.experts import route_tokens, run_experts
from halos_jax.models.spec import ClampedGate, DecoderConfig, ExpertsConfig
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.types import TARGET, Item

D, F, ROWS, LENGTH = 8, 6, 4, 5
EXPERTS = ExpertsConfig(num_experts=4, per_token=2, d_mlp=F)
CASES = {
    "normalized": EXPERTS,
    "as they are": dataclasses.replace(EXPERTS, normalize=False),
    "one": dataclasses.replace(EXPERTS, per_token=1, normalize=False),
    "three of three": ExpertsConfig(num_experts=3, per_token=3, d_mlp=F),  # 2 devices: F is split
    "biased": dataclasses.replace(EXPERTS, bias=True),
    "three, biased": ExpertsConfig(num_experts=3, per_token=2, d_mlp=F, bias=True),
}
NAMES = ("router", "expert_gate", "expert_up", "expert_down")


def make_weights(experts, mesh=None):
    """Return random weights of one layer, sharded as a model's are."""
    config = DecoderConfig(
        vocab_size=8, num_layers=1, d_model=D, num_heads=2, num_kv_heads=1, head_dim=4, d_mlp=F
    )
    random = np.random.default_rng(0)
    specs = spec.make_spec(dataclasses.replace(config, experts=experts))["layers"]
    weights = {}
    for name in (*NAMES, *(f"{name}_bias" for name in NAMES if experts.bias)):
        leaf = specs[name]
        value = 0.5 * random.normal(size=leaf.shape[1:]).astype(np.float32)
        if mesh is not None:
            place = sharding.named_sharding(leaf.axes[1:], leaf.shape[1:], mesh)
            value = jax.device_put(value, place)
        weights[name] = value
    return weights


def make_tokens():
    return np.random.default_rng(1).normal(size=(ROWS, LENGTH, D)).astype(np.float32)


def run_by_loops(x, weights, experts):
    """One token and one expert after the other, in float64."""
    out = np.zeros(x.shape)
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    nothing = np.zeros(experts.num_experts)
    router, gate, up, down = (weights.get(f"{name}_bias", nothing) for name in NAMES)
    for place in np.ndindex(x.shape[:-1]):
        token = x[place].astype(np.float64)
        logits = token @ weights["router"] + router
        probabilities = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-probabilities)[: experts.per_token]
        total = probabilities[chosen].sum() if experts.normalize else 1.0
        for expert in chosen:
            gated = token @ weights["expert_gate"][expert] + gate[expert]
            hidden = token @ weights["expert_up"][expert] + up[expert]
            hidden = gated / (1 + np.exp(-gated)) * hidden
            added = hidden @ weights["expert_down"][expert] + down[expert]
            out[place] += probabilities[expert] / total * added
    return out


@functools.partial(jax.jit, static_argnames="experts")
def run(x, weights, experts):
    return run_experts(x, weights, experts, lambda gate, up: jax.nn.silu(gate) * up)


@functools.partial(jax.jit, static_argnames="experts")
def run_gradients(x, weights, experts):
    def loss(x, weights):
        return jnp.sum(jnp.sin(run(x, weights, experts)))

    return jax.grad(loss, (0, 1))(x, weights)


@pytest.mark.parametrize("experts", CASES.values(), ids=CASES.keys())
def test_outputs_are_those_of_the_loops(experts):
    x, weights = make_tokens(), make_weights(experts)
    found = run(x, weights, experts)
    np.testing.assert_allclose(found, run_by_loops(x, weights, experts), rtol=1e-5, atol=1e-6)
    # One token a slot, as when decoding.
    found = run(x[:, 0], weights, experts)
    expected = run_by_loops(x[:, 0], weights, experts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["normalized", "biased"])
def test_gradients_are_those_of_finite_differences(name):
    experts, x = CASES[name], make_tokens()
    weights = make_weights(experts)
    towards = {name: np.sign(value) * 0.1 for name, value in weights.items()}
    _, gradients = run_gradients(x, weights, experts)
    for name in weights:
        step = 1e-4  # small enough that no token changes its experts

        def value(sign, name=name, step=step):
            moved = weights | {name: weights[name].astype(float) + sign * step * towards[name]}
            return np.sin(run_by_loops(x, moved, experts)).sum()

        expected = (value(1.0) - value(-1.0)) / (2 * step)
        found = np.sum(np.asarray(gradients[name]) * towards[name])
        assert found == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("name", ["normalized", "three of three", "biased", "three, biased"])
def test_a_mesh_changes_neither_outputs_nor_gradients(mesh, mesh1, name):
    experts, x = CASES[name], make_tokens()
    with jax.set_mesh(mesh1):
        alone = make_weights(experts)
        expected = run(x, alone, experts), run_gradients(x, alone, experts)
    weights = make_weights(experts, mesh)
    axes = tuple(weights["expert_up"].sharding.spec)
    by_number = experts.num_experts == 4
    assert axes == (("tensor", "fsdp", None) if by_number else (None, "fsdp", "tensor"))
    placed = sharding.put_batch(x, mesh)
    found = run(placed, weights, experts), run_gradients(placed, weights, experts)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped_and_none_sees_the_others():
    x, weights = make_tokens(), make_weights(EXPERTS)
    whole = np.asarray(run(x, weights, EXPERTS))
    for row in range(ROWS):
        alone = run(x[row : row + 1], weights, EXPERTS)
        np.testing.assert_allclose(alone[0], whole[row], rtol=1e-6, atol=1e-7)
    same = np.broadcast_to(x[0, 0], x.shape)  # all of them go to the same two experts
    found = np.asarray(run(same, weights, EXPERTS))
    np.testing.assert_array_equal(found, np.broadcast_to(found[0, 0], found.shape))
    np.testing.assert_allclose(found[0, 0], whole[0, 0], rtol=1e-6, atol=1e-7)


def test_the_router_is_exact_in_bfloat16():
    """Tokens and weights that bfloat16 holds are routed as in float64."""
    router = np.asarray(jnp.asarray(make_weights(EXPERTS)["router"], jnp.bfloat16))
    x = np.asarray(jnp.asarray(make_tokens(), jnp.bfloat16))
    weights = {"router": jnp.asarray(router)}
    chosen, shares = route_tokens(jnp.asarray(x), weights, EXPERTS)
    assert shares.dtype == jnp.float32
    logits = x.astype(np.float64) @ router.astype(np.float64)
    order = np.argsort(-logits, axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen, order)
    top = np.exp(np.take_along_axis(logits, order, -1))
    np.testing.assert_allclose(shares, top / top.sum(-1, keepdims=True), rtol=1e-5)


WHOLE = {
    "experts": {"experts": EXPERTS},
    "sinks and biases": {"experts": CASES["three, biased"], "sinks": True, "windows": (2, 0)}
    | {"clamped_gate": ClampedGate(1.7, 0.1)},
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_learns_the_same_on_any_mesh(mesh, mesh1, name):
    """Through the scan over layers and the remat of a training step."""
    config = DecoderConfig(
        vocab_size=32, num_layers=2, d_model=D, num_heads=2, num_kv_heads=2, head_dim=4, d_mlp=F
    )
    config = dataclasses.replace(config, remat="matmuls", init_std=0.3, **WHOLE[name])
    random = np.random.default_rng(0)
    drawn = [random.integers(1, 32, size).astype(np.int32) for size in (3, 4, 2, 5, 4, 6, 3, 2)]
    items = [Item(a, (b,), (TARGET,)) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]

    def compute_gradients(where, rows):
        plan = plan_batches(items, batch_size=4, num_rows=rows, tokens_per_row=32, row_multiple=16)
        batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
        with jax.set_mesh(where):
            shardings = spec.params_shardings(config, where)
            params = jax.jit(spec.init_params, static_argnums=1, out_shardings=shardings)(
                jax.random.key(0), config
            )
            run = jax.jit(jax.grad(lambda p, b: decoder.compute_logps(p, b, config).sum()))
            return run(params, sharding.put_batch(batch, where))

    found, expected = compute_gradients(mesh, 4), compute_gradients(mesh1, 1)
    for (path, got), wanted in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=str(path))
