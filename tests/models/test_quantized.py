"""Quantized frozen weights: how near they are, and that everything reads the same numbers."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.config import LoraConfig
from halos_jax.models import cache, decoder, lora
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import FAMILIES
from halos_jax.models.quantized import Quantized, dequantize, quantize
from halos_jax.models.spec import DecoderConfig, init_params
from tests.logits import compute_logits

TINY = DecoderConfig(61, 2, 128, 4, 2, 32, 192, init_std=0.1)
TOKENS, LENGTHS = np.arange(24).reshape(2, 12), jnp.array([12, 9])


def test_int8_is_off_by_half_a_step_and_nf4_by_its_widest_gap(mesh1):
    pytest.importorskip("qwix")
    weight = jax.random.normal(jax.random.key(0), (2, 4, 128, 16))
    weight = jax.device_put(weight.at[:, :, :64].multiply(100.0))  # one tile unlike the other
    back = np.asarray(dequantize(quantize(weight, "int8", (1, 2)), jnp.float32))
    step = np.abs(weight).max(axis=(1, 2), keepdims=True) / 127.5
    assert (np.abs(back - weight) <= 0.5 * step * (1 + 1e-4)).all()

    back = np.asarray(dequantize(quantize(weight, "nf4", (1, 2)), jnp.float32))
    tiles, found = (np.asarray(x).reshape(2, 4, 2, 64, 16) for x in (weight, back))
    largest = np.abs(tiles).max(axis=3, keepdims=True)
    assert (np.abs(found - tiles) <= 0.16 * largest).all()
    assert len(np.unique(np.round(found / largest, 4))) == 16


def make_frozen(kind, params_dtype="float32"):
    base = init_params(jax.random.key(0), dataclasses.replace(TINY, params_dtype=params_dtype))
    settings = LoraConfig(rank=3, dropout=0.0, targets=("q_proj", "down_proj"))
    adapter = lora.make_adapter(settings, TINY, FAMILIES["llama"], seed=0)
    return lora.Frozen(lora.quantize_base(base, kind), adapter)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_reader_sees_the_same_weights(kind):
    pytest.importorskip("qwix")
    frozen = make_frozen(kind)
    linear = {"q", "k", "v", "o", "gate", "up", "down"}
    assert {n for n, x in frozen.base["layers"].items() if isinstance(x, Quantized)} == linear
    bits = {"int8": 8, "nf4": 4}[kind]
    values = frozen.base["layers"]["q"].array.qvalue
    assert jnp.iinfo(values.dtype).bits == bits and values.shape == (2, 128, 4, 32)

    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32),
        lora.make_spec(frozen.adapter, TINY),
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )
    plain = frozen.replace(base=decoder.cast_params(frozen.base, TINY))
    run = lambda frozen: compute_logits(  # noqa: E731
        lora.attach_adapter(adapter, frozen), TOKENS, LENGTHS, TINY
    )
    found, expected = run(frozen), run(plain)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    original = init_params(jax.random.key(0), TINY)
    off = np.linalg.norm(found - run(frozen.replace(base=original))) / np.linalg.norm(found)
    assert 1e-4 < off < {"int8": 0.03, "nf4": 0.5}[kind]

    merged, wanted = (
        cache.unstack_layers(lora.merge_adapter(adapter, one), TINY) for one in (frozen, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, wanted)

    gradient = jax.grad(
        lambda adapter, frozen: jnp.sum(
            compute_logits(lora.attach_adapter(adapter, frozen), TOKENS, LENGTHS, TINY) ** 2
        )
    )
    for x, y in zip(
        jax.tree.leaves(gradient(adapter, frozen)), jax.tree.leaves(gradient(adapter, plain))
    ):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())


def test_the_same_numbers_on_any_mesh_where_they_lay(mesh):
    pytest.importorskip("qwix")
    from halos_jax.models.spec import params_shardings

    params = init_params(jax.random.key(0), TINY)
    placed = jax.device_put(params, params_shardings(TINY, mesh))
    shardings = jax.tree.map(lambda x: x.sharding, placed["layers"])
    one, many = (lora.quantize_base(x, "nf4")["layers"] for x in (params, placed))
    for name in ("q", "o", "down"):
        values = many[name].array.qvalue
        assert values.sharding.is_equivalent_to(shardings[name], values.ndim)
        np.testing.assert_array_equal(
            dequantize(one[name], "float32"), dequantize(many[name], "float32")
        )


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ModelError, match=r"pip install 'halos_jax\[qlora\]', or set --config"):
        make_frozen("int8")


def test_all_processes_quantize_a_base_in_one_order(monkeypatch):
    # The order of a set of names differs between processes, which then exchange wrong maxima.
    seen = []
    monkeypatch.setattr(lora, "quantize", lambda leaf, kind, inputs: seen.append(leaf) or leaf)
    names = ("up", "q", "down", "gate", "o", "v", "k")
    lora.quantize_base({"layers": {name: name for name in names}}, "nf4")
    assert seen == sorted(names)
