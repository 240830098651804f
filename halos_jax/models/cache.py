"""The key-value cache and the decode step, with layers unrolled and one array a layer.

Scanning the layers would slice weights and cache out of their stacks at every step, so the
sampler unstacks the weights once (`unstack_layers`) and the cache never was a stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from halos_jax import sharding
from halos_jax.models import decoder
from halos_jax.models.attention.backends import attend_cache, attend_rows
from halos_jax.models.attention.rope import make_rotations
from halos_jax.models.head import project_logits
from halos_jax.models.lora import take_layer
from halos_jax.models.spec import DecoderConfig, list_layer_kinds, make_spec
from halos_jax.sharding import constrain
from halos_jax.types import Params


@struct.dataclass
class Cache:
    """Keys and values: one `[S, C, K, H]` array a layer each."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


# Weights that read one input, joined: name -> (names, axis of weight and bias alike).
JOINT = {"qkv": (("q", "k", "v"), -2), "gate_up": (("gate", "up"), -1)}


def init_cache(config: DecoderConfig, *, slots: int, length: int) -> Cache:
    """Return an empty cache of `slots` sequences of at most `length` tokens."""
    shape = (slots, length, config.num_kv_heads, config.head_dim)

    def arrays() -> tuple[jax.Array, ...]:
        return tuple(
            _constrain_cache(jnp.zeros(shape, config.compute_dtype))
            for _ in range(config.num_layers)
        )

    return Cache(arrays(), arrays())


def unstack_layers(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """Return params in the compute dtype with `layers` as a tuple of one dict a layer.

    They are gathered over "fsdp" here, once: a decode step is too short to gather them in it. An
    adapter that `merge_adapter` left to be added is added here. Weights that read one input are
    joined ("qkv", "gate_up") where they are not split over "tensor": a few rows make one large
    matrix product faster than several small ones.
    """

    def gather(axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
        return constrain(x, *(None if axis == "embed" else axis for axis in axes))

    spec = make_spec(config)
    stacked = spec.pop("layers")

    def take(layer: int) -> dict[str, jax.Array]:
        weights = {
            name: gather(
                leaf.axes[1:], take_layer(params["layers"][name], layer, config.compute_dtype)
            )
            for name, leaf in stacked.items()
        }
        return weights if sharding.is_split("tensor") else _join_weights(weights)

    unstacked = tuple(map(take, range(config.num_layers)))
    outer = {
        name: gather(leaf.axes, params[name].astype(config.compute_dtype))
        for name, leaf in spec.items()
    }
    return {**outer, "layers": unstacked}


def _join_weights(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    joined = dict(weights)
    for name, (parts, axis) in JOINT.items():
        for suffix in ("", "_bias"):
            if all(part + suffix in weights for part in parts):
                taken = [joined.pop(part + suffix) for part in parts]
                joined[name + suffix] = jnp.concatenate(taken, axis)
    return joined


def prefill(
    weights: dict[str, Any], tokens: jax.Array, lengths: jax.Array, config: DecoderConfig
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the keys and values, one `[G, T, K, H]` a layer, of right-padded prompts `[G, T]`."""
    x = decoder.embed_tokens(weights, tokens, config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotation_of = make_rotations(config, positions)
    kinds, kind_of_layer = list_layer_kinds(config)
    keys, values = [], []
    for kind, layer_weights in zip(kind_of_layer, weights["layers"], strict=True):
        run = functools.partial(attend_rows, lengths=lengths)
        attend = decoder.make_attend(run, config, kinds[kind])
        x, (k, v) = decoder.run_block(
            x, layer_weights, rotate=rotation_of(kind), attend=attend, config=config
        )
        keys.append(_constrain_cache(k))
        values.append(_constrain_cache(v))
    return tuple(keys), tuple(values)


def constrain_cache(cache: Cache) -> Cache:
    """Constrain every array of `cache` to its sharding."""
    constrained: Cache = jax.tree.map(_constrain_cache, cache)
    return constrained


def insert_prompts(
    cache: Cache,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    rows: jax.Array,
    slots: jax.Array,
) -> Cache:
    """Copy prefilled prompts into slots: prompt `rows[i]` to slot `slots[i]`, i32[A] each.

    A slot number outside the cache is dropped, which pads an insertion to a fixed size.
    """

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        updated = old.at[slots, : new.shape[1]].set(new[rows], mode="drop")
        return _constrain_cache(updated)

    return Cache(tuple(map(insert, cache.keys, keys)), tuple(map(insert, cache.values, values)))


def decode_step(
    weights: dict[str, Any],
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    config: DecoderConfig,
) -> tuple[jax.Array, Cache]:
    """Append one token a slot and return the logits of the next.

    Args:
      weights: from `unstack_layers`.
      cache: written in place where its buffers are donated.
      tokens: i32[S].
      positions: i32[S], where the tokens stand in their sequences.

    Returns:
      Logits f32[S, V] and the cache.
    """
    kinds, kind_of_layer = list_layer_kinds(config)
    rotation_of = make_rotations(config, positions)
    keys, values = list(cache.keys), list(cache.values)
    rows = jnp.arange(tokens.shape[0])
    x = decoder.embed_tokens(weights, tokens, config)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, layer: int, **settings: Any
    ) -> jax.Array:
        write = functools.partial(_write_row, rows=rows, positions=positions)
        keys[layer], values[layer] = write(keys[layer], k), write(values[layer], v)
        return attend_cache(q, keys[layer], values[layer], positions, **settings)

    for layer, layer_weights in enumerate(weights["layers"]):
        kind, run = kind_of_layer[layer], functools.partial(attend, layer=layer)
        x, _ = decoder.run_block(
            x,
            layer_weights,
            rotate=rotation_of(kind),
            attend=decoder.make_attend(run, config, kinds[kind]),
            config=config,
        )
    x = decoder.finish(weights, x, config)
    logits = project_logits(x, decoder.get_head(weights, config), config.logit_softcap)
    return logits, Cache(tuple(keys), tuple(values))


def _write_row(
    old: jax.Array, new: jax.Array, *, rows: jax.Array, positions: jax.Array
) -> jax.Array:
    updated = old.at[rows, positions].set(new, unique_indices=True, indices_are_sorted=True)
    return _constrain_cache(updated)


def _constrain_cache(x: jax.Array) -> jax.Array:
    return constrain(x, "rows", None, "kv_heads", None)
