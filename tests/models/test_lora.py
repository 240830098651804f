"""LoRA: the adapter is what the formula says, trains alone, and can be added to the base."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from halos_jax import sharding
from halos_jax.config import LoraConfig
from halos_jax.losses import get_loss
from halos_jax.models import cache, decoder, lora
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import FAMILIES
from halos_jax.models.spec import (
    ClampedGate,
    DecoderConfig,
    ExpertsConfig,
    init_params,
    make_spec,
    params_shardings,
)
from halos_jax.training import step as steps
from halos_jax.types import CHOSEN, REJECTED
from tests.logits import compute_logits
from tests.training import test_step

TINY = DecoderConfig(
    vocab_size=61,
    num_layers=2,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_mlp=40,
    init_std=0.2,
)
NEOX = dataclasses.replace(TINY, num_kv_heads=4, norm="layer", gated_mlp=False, mlp_bias=True)
GPT_OSS = dataclasses.replace(
    TINY,
    experts=ExpertsConfig(3, 2, 40, bias=True),
    clamped_gate=ClampedGate(1.702, 1.0),
    sinks=True,
    windows=(3, 0),
    qkv_bias=True,
    out_bias=True,
)
CONFIGS = {"llama": TINY, "phi3": TINY, "gpt_neox": NEOX, "gpt_oss": GPT_OSS}
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 10))
LENGTHS = jnp.array([10, 7, 3])


def make_adapter(family="llama", **settings):
    settings = LoraConfig(**({"rank": 3, "alpha": 6.0, "dropout": 0.0} | settings))
    return lora.make_adapter(settings, CONFIGS[family], FAMILIES[family], seed=5)


def make_frozen(family="llama", **settings):
    base = init_params(jax.random.key(0), CONFIGS[family])
    return lora.Frozen(base, make_adapter(family, **settings))


def draw_adapter(frozen, family="llama", seed=1):
    """Return an adapter whose `b` are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32),
        lora.make_spec(frozen.adapter, CONFIGS[family]),
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )


def logits(params, config):
    return np.asarray(compute_logits(params, TOKENS, LENGTHS, config))


def merge_by_hand(frozen, adapter):
    """Return base + scale * a b, module by module, in float64."""
    layers = {k: np.asarray(v, np.float64) for k, v in frozen.base["layers"].items()}
    for module in frozen.adapter.modules:
        for path in module.paths:
            a, b = (
                np.asarray(adapter["layers"][name], np.float64)
                for name in (module.a_name, f"{path}_lora_b")
            )
            flat_a, flat_b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
            delta = frozen.adapter.scale * np.matmul(flat_a, flat_b)
            layers[path] = layers[path] + delta.reshape(layers[path].shape)
    layers = {name: jnp.asarray(value, jnp.float32) for name, value in layers.items()}
    return {**frozen.base, "layers": layers}


@pytest.mark.parametrize("family", CONFIGS)
def test_attached_and_merged_give_the_logits_of_base_plus_adapter(family):
    frozen, config = make_frozen(family), CONFIGS[family]
    adapter = draw_adapter(frozen, family)
    expected = logits(merge_by_hand(frozen, adapter), config)
    assert np.abs(expected - logits(frozen.base, config)).max() > 0.1
    attached = logits(lora.attach_adapter(adapter, frozen), config)
    np.testing.assert_allclose(attached, expected, atol=1e-4)

    merged = lora.merge_adapter(adapter, frozen)
    by_hand = merge_by_hand(frozen, adapter)["layers"]
    for path, leaf in merged["layers"].items():
        for layer in range(2):
            taken = lora.take_layer(leaf, layer, jnp.float32)
            np.testing.assert_allclose(taken, by_hand[path][layer], atol=1e-6)
    unstacked = jax.jit(lambda tree: cache.unstack_layers(tree, config))(merged)
    stacked = merged["layers"].keys()
    for layer, weights in enumerate(unstacked["layers"]):
        expected = {path: by_hand[path][layer] for path in stacked}
        for end, axis in {"": 1, "_bias": 0}.items():
            if f"q{end}" in expected:
                parts = [expected.pop(f"{name}{end}") for name in "qkv"]
                expected[f"qkv{end}"] = np.concatenate(parts, axis=axis)
        if "gate" in expected:
            both = expected.pop("gate"), expected.pop("up")
            expected["gate_up"] = np.concatenate(both, axis=1)
        assert weights.keys() == expected.keys()
        for path, leaf in weights.items():
            np.testing.assert_allclose(leaf, expected[path], atol=1e-6)


def test_a_fresh_adapter_is_the_base_exactly(mesh1):
    frozen = make_frozen()
    fresh = lora.init_adapter(3, frozen, TINY, mesh1)
    assert jax.tree.structure(fresh) == jax.tree.structure(draw_adapter(frozen))
    base = logits(frozen.base, TINY)
    np.testing.assert_array_equal(logits(lora.attach_adapter(fresh, frozen), TINY), base)
    # As PEFT draws it: uniform, of variance 1 / (3 inputs).
    wide = dataclasses.replace(TINY, d_model=64, d_mlp=512)
    frozen = lora.Frozen({"layers": {}}, make_adapter(rank=32))
    drawn = lora.init_adapter(3, frozen, wide, mesh1)["layers"]
    for name, inputs in (("down_lora_a", 512), ("q_lora_a", 64), ("o_lora_a", 24)):
        values = np.asarray(drawn[name]) * math.sqrt(inputs)
        assert -1 <= values.min() < -0.95 and 0.95 < values.max() <= 1
        assert values.var() == pytest.approx(1 / 3, rel=0.1)
    assert not np.array_equal(drawn["q_lora_a"][:, :, :1], drawn["k_lora_a"][:, :, :1])


def test_the_same_adapter_on_any_mesh(mesh, mesh1):
    frozen = make_frozen(targets=("q_proj", "down_proj"))
    one, many = (lora.init_adapter(2, frozen, TINY, m) for m in (mesh1, mesh))
    jax.tree.map(np.testing.assert_array_equal, one, many)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, many)
    wanted = lora.abstract_trained(TINY, mesh, frozen.adapter)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, wanted)
    assert shardings["layers"]["q_lora_b"].spec == P(None, None, "tensor", None)
    assert shardings["layers"]["down_lora_a"].spec == P(None, "tensor", None)


def test_targets_are_named_as_in_peft():
    names = [m.name for m in make_adapter().modules]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert names == attention + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    some = make_adapter(targets=("v_proj", "self_attn.q_proj"))
    assert [m.paths for m in some.modules] == [("q",), ("v",)]
    fused = make_adapter("phi3", targets=("qkv_proj", "gate_up_proj"))
    assert [m.paths for m in fused.modules] == [("q", "k", "v"), ("gate", "up")]
    # One `a` for the three, as the checkpoint's one linear layer has one input matrix.
    assert lora.make_spec(fused, TINY)["layers"].keys() == {
        *("q_k_v_lora_a", "q_lora_b", "k_lora_b", "v_lora_b"),
        *("gate_up_lora_a", "gate_lora_b", "up_lora_b"),
    }
    assert [m.name for m in make_adapter("gpt_neox").modules] == [
        *("attention.query_key_value", "attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ]


def test_an_unknown_target_lists_what_there_is():
    for targets in (("q_proj", "query", "lm_head"), ("all-linear", "query", "lm_head")):
        with pytest.raises(ModelError) as error:
            make_adapter("phi3", targets=targets)
        assert "'query', 'lm_head'; allowed: 'all-linear' alone, or a tuple" in str(error.value)
        assert str(error.value).endswith(": qkv_proj, o_proj, gate_up_proj, down_proj")


def test_scale_and_its_default():
    assert make_adapter().scale == 2.0
    assert make_adapter(alpha=0.0, rank=64).scale == 4.0  # HALOs: 256 / 64
    assert make_adapter(rank=4, rslora=True).scale == 3.0


def test_the_score_head_is_trained_beside_the_adapter(mesh1):
    config = dataclasses.replace(TINY, num_labels=1, params_dtype="float32")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(jax.random.key(0), config))
    frozen = lora.Frozen(base, make_adapter(targets=("q_proj",)))
    fresh = lora.init_adapter(1, frozen, config, mesh1)
    assert fresh["score"].dtype == jnp.float32
    np.testing.assert_array_equal(fresh["score"], base["score"].astype(jnp.float32))
    moved = fresh | {"score": fresh["score"] + 1}
    for whole in (lora.attach_adapter(moved, frozen), lora.merge_adapter(moved, frozen)):
        np.testing.assert_array_equal(whole["score"], moved["score"])


def test_dropout_is_a_function_of_seed_step_and_microbatch():
    frozen, rate = make_frozen(dropout=0.25), 0.25
    adapter = draw_adapter(frozen)

    def run(step, microbatch, frozen=frozen):
        placed = lora.fold_microbatch(lora.start_dropout(frozen, jnp.int32(step)), microbatch)
        return logits(lora.attach_adapter(adapter, placed), TINY)

    first = run(3, 1)
    np.testing.assert_array_equal(run(3, 1), first)
    reseeded = frozen.replace(adapter=dataclasses.replace(frozen.adapter, seed=6))
    for other in (run(4, 1), run(3, 0), run(3, 1, reseeded)):
        assert np.abs(other - first).max() > 1e-3
    # Without a step (evaluation, reference, sampler) there is none, nor where the rate is 0.
    plain = logits(lora.attach_adapter(adapter, frozen), TINY)
    np.testing.assert_allclose(plain, logits(merge_by_hand(frozen, adapter), TINY), atol=1e-4)
    off = frozen.replace(adapter=dataclasses.replace(frozen.adapter, dropout=0.0))
    np.testing.assert_array_equal(run(3, 1, off), plain)

    # What enters an adapter is dropped at the rate, scaled up by the rest, anew in each layer.
    weights = lora.attach_adapter(adapter, lora.start_dropout(frozen, 0))["layers"]
    masks = []
    for layer in range(2):
        of_layer = jax.tree.map(lambda x, layer=layer: x[layer], weights)
        dropped = np.asarray(decoder.layers._drop(jnp.ones((50, 80, 24)), of_layer, "q"))
        assert set(np.unique(dropped)) == {0, np.float32(1 / (1 - rate))}
        assert (dropped == 0).mean() == pytest.approx(rate, abs=0.01)
        masks.append(dropped == 0)
        other = np.asarray(decoder.layers._drop(jnp.ones((50, 80, 24)), of_layer, "o"))
        assert not np.array_equal(other, dropped)
    assert not np.array_equal(*masks)


def test_without_a_frozen_part_params_are_the_model():
    params = init_params(jax.random.key(0), TINY)
    assert lora.attach_adapter(params, None) is params
    assert lora.merge_adapter(params, None) is params
    assert lora.start_dropout(None, 1) is None and lora.fold_microbatch(None, 1) is None
    assert make_spec(TINY).keys() == params.keys()


# --------------------------------------------------------------------------- gradients


def make_trained(mesh, targets=("all-linear",)):
    """Return (frozen, adapter) of the tiny model, no `b` of it zero, and base + adapter."""
    settings = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=targets)
    base = jax.device_put(
        test_step.make_params(test_step.TINY), params_shardings(test_step.TINY, mesh)
    )
    frozen = lora.Frozen(
        base, lora.make_adapter(settings, test_step.TINY, FAMILIES["llama"], seed=0)
    )
    rng = np.random.default_rng(3)
    adapter = jax.tree.map(
        lambda leaf: jax.device_put(0.1 * rng.normal(size=leaf.shape).astype("f4"), leaf.sharding),
        lora.abstract_trained(test_step.TINY, mesh, frozen.adapter),
    )
    layers = {
        name: jnp.stack([lora.take_layer(leaf, layer, "float32") for layer in range(2)])
        for name, leaf in lora.merge_adapter(adapter, frozen)["layers"].items()
    }
    return frozen, adapter, {**frozen.base, "layers": layers}


def test_an_adapter_has_its_part_of_the_whole_gradient_on_any_packing_and_mesh(mesh, mesh1):
    loss = get_loss(test_step.LOSSES["dpo"][0])
    run = jax.jit(functools.partial(steps.loss_and_gradient, loss=loss, config=test_step.TINY))
    results = []
    with jax.set_mesh(mesh1):
        frozen, adapter, merged = make_trained(mesh1)
        for packing in ("one packed row", "four microbatches"):
            _, batch = test_step.make_batch(
                (CHOSEN, REJECTED), test_step.make_reference(), **test_step.PACKINGS[packing]
            )
            results.append(jax.device_get(run(adapter, frozen, batch)[:2]))
        value, whole, _ = jax.device_get(run(merged, None, batch))
    with jax.set_mesh(mesh):
        frozen, placed, _ = make_trained(mesh)
        _, batch = test_step.make_batch(
            (CHOSEN, REJECTED), test_step.make_reference(), num_rows=4, microbatches=2
        )
        batch = sharding.put_batch(batch, mesh, leading=1)
        results.append(jax.device_get(run(placed, frozen, batch)[:2]))

    # With W' = W + s a b: dL/da = s dL/dW' b^T and dL/db = s a^T dL/dW'.
    adapter, expected = jax.device_get(adapter)["layers"], {}
    for path, inputs in {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}.items():
        a, b = (adapter[f"{path}_lora_{end}"] for end in "ab")
        flat = whole["layers"][path].reshape(2, np.prod(a.shape[1 : 1 + inputs]), -1)
        a2, b2 = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        expected[f"{path}_lora_a"] = 2.0 * (flat @ b2.swapaxes(1, 2)).reshape(a.shape)
        expected[f"{path}_lora_b"] = 2.0 * (a2.swapaxes(1, 2) @ flat).reshape(b.shape)
    for result in results:
        test_step.compare(result, (value, {"layers": expected}))


def test_no_gradient_of_a_frozen_weight_is_formed(mesh1):
    """Neither that of the head, made by a rule of its own, nor that of any layer."""
    frozen, adapter, merged = make_trained(mesh1, targets=("q_proj",))
    _, batch = test_step.make_batch(
        (CHOSEN, REJECTED), test_step.make_reference(), **test_step.PACKINGS["one packed row"]
    )
    loss = get_loss(test_step.LOSSES["dpo"][0])
    run = functools.partial(steps.loss_and_gradient, loss=loss, config=test_step.TINY)
    frozen_shapes = {"f32[97,32]{": "head", "f32[32,48]{": "mlp"}

    def find(params, frozen):
        text = jax.jit(run).lower(params, frozen, batch).compile().as_text()
        lines = [x for x in text.splitlines() if "transpose(jvp" in x and " dot(" in x]
        return {
            name for shape, name in frozen_shapes.items() if any(f"= {shape}" in x for x in lines)
        }

    assert find(merged, None) == {"head", "mlp"}, "the case has nothing to show"
    assert find(adapter, frozen) == set()
