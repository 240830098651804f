"""Digests of weights in memory: of their bits, whatever mesh they lie on, at the cost of a read.

Every element's bits are mixed with its place and added up modulo 2^32, twice with other factors.
Integer sums do not depend on their order, so devices add up what they hold. It tells weights apart
(two differ in a digest but for a chance of 2^-64); it is no seal against somebody who looks for a
second set of weights with the same digest: the hashes of the workdir's ledger are.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from halos_jax.models.cache import JOINT
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig, make_spec
from halos_jax.types import Params, Tree

# Odd numbers for each of the two sums: of the bits, and of an index along each axis.
_FACTORS = (
    (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D),
    (0xB5297A4D, 0x68E31DA5, 0x1B56C4E9, 0xA1C3D5E7, 0x7FEB352D, 0x846CA68B),
)
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}  # where its bits are
_SMALL = 1 << 22  # elements that the host reads itself, where that spares it a compilation

Folded = Mapping[str, np.ndarray]  # name -> u32[2] or u32[2, layers]


def fingerprint(params: Params, frozen: Frozen | None = None) -> str:
    """Return the fingerprint of a policy: 32 hex digits, and 32 of the base of an adapter.

    It is a function of names, shapes, dtypes and bits alone.
    """
    parts = [params] if frozen is None else [params, frozen.base]
    return "+".join(map(_hash_tree, parts))


def _hash_tree(tree: Tree) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    folded = jax.device_get([_fold(leaf) for _, leaf in leaves])
    rows = [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype), sums.tolist()]
        for (path, leaf), sums in zip(leaves, folded, strict=True)
    ]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:32]


# --------------------------------------------------------------------------- the sampler's


def fold_params(params: Params, config: DecoderConfig) -> Folded:
    """Return the digests of params as the sampler holds them, in the compute dtype, by layer.

    Weights that an adapter or a scale is still to be added to are left out: sums of products may
    round otherwise from program to program.
    """
    folded: dict[str, jax.Array | np.ndarray] = {}
    for name, leaf in params["layers"].items():
        if isinstance(leaf, jax.Array) and name in make_spec(config)["layers"]:
            folded[f"layers.{name}"] = _fold(leaf, config.compute_dtype, leading=1)
    for name in make_spec(config).keys() - {"layers"}:
        folded[name] = _fold(params[name], config.compute_dtype)
    return {name: np.asarray(sums) for name, sums in folded.items()}


def fold_weights(weights: Params, config: DecoderConfig) -> Folded:
    """Return the same digests of `weights`, those of `models.cache.unstack_layers`."""
    spec = make_spec(config)
    shapes = {name: leaf.shape[1:] for name, leaf in spec.pop("layers").items()}
    layers = [
        {name: _fold(leaf) for name, leaf in _split_joint(layer, shapes).items()}
        for layer in weights["layers"]
    ]
    outer = {name: _fold(weights[name]) for name in spec}
    host = jax.device_get((layers, outer))
    folded = {f"layers.{name}": np.stack([one[name] for one in host[0]], -1) for name in shapes}
    return {**folded, **host[1]}


def find_other(expected: Folded, found: Folded) -> list[str]:
    """Return the names of the weights that are not as expected, with the layers of stacked ones."""
    names = []
    for name, sums in sorted(expected.items()):
        wrong = np.atleast_1d(np.any(sums != found[name], axis=0))
        if wrong.any():
            layers = ", ".join(map(str, np.flatnonzero(wrong))) if sums.ndim > 1 else ""
            names.append(f"{name} (layers {layers})" if layers else name)
    return names


def _split_joint(
    layer: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.Array]:
    """Return the weights of a layer by their names in the spec, joined ones taken apart."""
    parts = dict(layer)
    for joint, (names, axis) in JOINT.items():
        for suffix in ("", "_bias"):
            if joint + suffix not in parts:
                continue
            whole, start = parts.pop(joint + suffix), 0
            for name in names:
                size = shapes[name + suffix][axis]
                index = [slice(None)] * whole.ndim
                index[axis] = slice(start, start + size)
                parts[name + suffix], start = whole[tuple(index)], start + size
    return parts


# --------------------------------------------------------------------------- sums of bits


def _fold(leaf: jax.Array, dtype: Any = None, leading: int = 0) -> jax.Array | np.ndarray:
    """Return the sums u32[2, *leading axes] of an array, cast to `dtype` before."""
    is_whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if is_whole and leaf.size <= _SMALL and jax.default_backend() == "cpu":
        with np.errstate(over="ignore"):  # of numbers, not of arrays, which wrap silently
            found: np.ndarray = _sum_bits(np.asarray(leaf), dtype, leading, np)
        return found
    folded: jax.Array = _compile(leaf.sharding)(leaf, dtype=dtype, leading=leading)
    return folded


@functools.lru_cache(maxsize=64)
def _compile(sharding: jax.sharding.Sharding) -> Any:
    placed = None
    if isinstance(sharding, NamedSharding):  # the host reads the sums, on every process
        placed = NamedSharding(sharding.mesh, PartitionSpec())
    run = functools.partial(_sum_bits, xp=jnp)
    return jax.jit(run, static_argnames=("dtype", "leading"), out_shardings=placed)


def _sum_bits(x: Any, dtype: Any, leading: int, xp: Any) -> Any:
    """Return the two sums of an array's mixed bits, over all axes but the `leading` ones.

    `xp` is numpy or jax.numpy: both give the same.
    """
    bits = _take_bits(x if dtype is None else x.astype(dtype), xp)
    sums = []
    for factor, *factors in _FACTORS:
        mixed = bits * xp.uint32(factor)
        # The place within the part that is summed up: a layer on its own has the same digest.
        for axis in range(leading, bits.ndim):
            shape = [1] * bits.ndim
            shape[axis] = -1
            index = xp.arange(bits.shape[axis], dtype=xp.uint32).reshape(shape)
            mixed = mixed + index * xp.uint32(factors[(axis - leading) % len(factors)])
        mixed = (mixed ^ (mixed >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
        mixed = mixed ^ (mixed >> xp.uint32(16))
        axes = tuple(range(leading, bits.ndim))
        sums.append(xp.sum(mixed, axis=axes, dtype=xp.uint32))
    return xp.stack(sums)


def _take_bits(x: Any, xp: Any) -> Any:
    """Return the bits of an array's elements as u32; those of a number below the normal ones are 0.

    Not every device keeps such small numbers when it casts.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(xp.int32).astype(xp.uint32)
    unsigned = {1: xp.uint8, 2: xp.uint16, 4: xp.uint32}[x.dtype.itemsize]
    raw = x.view(unsigned) if xp is np else jax.lax.bitcast_convert_type(x, unsigned)
    bits = raw.astype(xp.uint32)
    exponent = xp.uint32(_EXPONENTS.get(str(x.dtype), 0xFFFFFFFF))
    return xp.where(bits & exponent, bits, xp.uint32(0))
