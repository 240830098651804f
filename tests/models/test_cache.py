"""Decoding through the cache against the full forward pass, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax import sharding
from halos_jax.models import cache as caches
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from tests.logits import compute_logits

TINY = DecoderConfig(
    vocab_size=97,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    init_std=0.2,
)
PROMPTS = np.array([5, 1, 9, 7])  # lengths
FORKS = np.array([2, 0, 2, 3, 1, 0])  # the prompt of each slot but the last two, which stay idle
STEPS, LENGTH = 6, 18


@functools.cache
def make_tokens():
    """Return prompts i32[G, T], and for each slot the whole sequence that it is fed."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 97, (len(PROMPTS), PROMPTS.max()))
    prompts *= np.arange(PROMPTS.max()) < PROMPTS[:, None]
    sequences = [
        np.concatenate([prompts[prompt][: PROMPTS[prompt]], rng.integers(1, 97, STEPS)])
        for prompt in FORKS
    ]
    return prompts.astype(np.int32), sequences


def decode_all(params, config, mesh=None):
    """Prefill, fork and decode; return logits f32[STEPS, slots, V]."""
    prompts, sequences = make_tokens()
    slots = len(FORKS) + 2
    weights = jax.jit(functools.partial(caches.unstack_layers, config=config))(params)
    batch = (jnp.asarray(prompts), jnp.asarray(PROMPTS - 1, jnp.int32))
    if mesh is not None:
        batch = sharding.put_batch(batch, mesh)
    keys, values = jax.jit(functools.partial(caches.prefill, config=config))(weights, *batch)
    cache = caches.init_cache(config, slots=slots, length=LENGTH)
    source = np.array([*FORKS, 3, 1])
    target = np.array([*range(len(FORKS)), slots, slots + 7])  # two are padding
    cache = jax.jit(caches.insert_prompts)(cache, keys, values, source, target)
    step = jax.jit(functools.partial(caches.decode_step, config=config), donate_argnums=1)
    found = []
    for number in range(STEPS):
        tokens, positions = np.zeros((2, slots), np.int32)
        for slot, prompt in enumerate(FORKS):
            # The prompt's last token is the first that is fed.
            positions[slot] = PROMPTS[prompt] - 1 + number
            tokens[slot] = sequences[slot][positions[slot]]
        logits, cache = step(weights, cache, jnp.asarray(tokens), jnp.asarray(positions))
        found.append(np.asarray(logits))
    return np.stack(found)


@functools.cache
def expected_logits(tie):
    """Return each slot's logits f32[STEPS, V] from the full forward pass."""
    config = dataclasses.replace(TINY, tie_embeddings=tie)
    params = init_params(jax.random.key(0), config)
    _, sequences = make_tokens()
    padded = np.zeros((len(sequences), LENGTH), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    lengths = jnp.array([len(sequence) for sequence in sequences])
    run = jax.jit(functools.partial(compute_logits, config=config))
    logits = np.asarray(run(params, jnp.asarray(padded), lengths))
    starts = PROMPTS[FORKS] - 1
    return params, config, [row[at : at + STEPS] for row, at in zip(logits, starts, strict=True)]


def compare(got, expected, tolerance):
    for slot, logits in enumerate(expected):
        error = np.abs(got[:, slot] - logits).max() / np.abs(logits).max()
        assert error < tolerance, f"slot {slot}: {error}"


def test_decoding_equals_the_full_forward_pass():
    params, config, expected = expected_logits(False)
    compare(decode_all(params, config), expected, 1e-5)


def test_decoding_on_the_mesh_equals_the_full_forward_pass(mesh1, mesh):
    with jax.set_mesh(mesh1):
        params, config, expected = expected_logits(True)
    spread = jax.device_put(jax.tree.map(np.asarray, params), params_shardings(config, mesh))
    compare(decode_all(spread, config, mesh), expected, 1e-5)


def test_prompts_go_to_their_slots_and_padding_is_dropped():
    cache = caches.init_cache(TINY, slots=4, length=10)
    cache = jax.tree.map(lambda x: jnp.full_like(x, -1.0), cache)
    prompts = jnp.arange(3.0)[:, None, None, None] * jnp.ones((3, 6, 2, 8))
    keys = (prompts,) * TINY.num_layers
    values = tuple(x + 10 for x in keys)
    got = caches.insert_prompts(
        cache, keys, values, jnp.array([2, 0, 2, 1]), jnp.array([0, 3, 1, 4])
    )
    for arrays, offset in ((got.keys, 0), (got.values, 10)):
        assert len(arrays) == TINY.num_layers
        for array in arrays:
            np.testing.assert_array_equal(
                array[:, :6, 0, 0],
                np.repeat(np.array([[2 + offset], [2 + offset], [-1], [0 + offset]]), 6, axis=1),
            )
            assert (np.asarray(array[:, 6:]) == -1).all()


def test_the_cache_and_the_weights_have_the_compute_dtype_and_one_array_a_layer():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    init = functools.partial(caches.init_cache, config, slots=3, length=5)
    unstack = functools.partial(caches.unstack_layers, config=config)
    params = init_params(jax.random.key(0), config)
    cache, weights = jax.eval_shape(init), jax.jit(unstack)(params)
    assert [x.shape for x in cache.keys] == [(3, 5, 2, 8)] * 2
    assert {x.dtype for x in jax.tree.leaves((cache, weights))} == {jnp.dtype("bfloat16")}
    assert len(weights["layers"]) == 2
    for number, layer in enumerate(weights["layers"]):
        one = {name: np.asarray(leaf)[number] for name, leaf in params["layers"].items()}
        one["qkv"] = np.concatenate([one.pop(name) for name in "qkv"], axis=1)
        one["gate_up"] = np.concatenate([one.pop("gate"), one.pop("up")], axis=1)
        assert layer.keys() == one.keys()
        for name, value in layer.items():
            np.testing.assert_array_equal(value, one[name].astype(jnp.bfloat16))


def test_decoding_weights_are_whole_over_fsdp_and_split_over_tensor(mesh):
    params = jax.device_put(init_params(jax.random.key(0), TINY), params_shardings(TINY, mesh))
    weights = jax.jit(functools.partial(caches.unstack_layers, config=TINY))(params)
    assert "fsdp" in params["layers"]["q"].sharding.spec
    for name, leaf in (("q", (32, 2, 8)), ("gate", (32, 24))):
        weight = weights["layers"][0][name]
        assert weight.sharding.shard_shape(weight.shape) == leaf
