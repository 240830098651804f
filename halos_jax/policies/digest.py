"""Digests of weights in memory: of their bits, whatever mesh they lie on, at the cost of a read.

Every element's bits are mixed with its place and added up modulo 2^32, twice with other factors.
Integer sums do not depend on their order, so devices add up what they hold. It tells weights apart
(two differ in a digest but for a chance of 2^-64); it is no seal against somebody who looks for a
second set of weights with the same digest: the hashes of the workdir's ledger are.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

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


class _Recipe(NamedTuple):
    """What to add up of an array: cast to `dtype`, with an own sum for each of `keep` leading axes.

    The index along an axis counts from axis `start` on: a layer on its own has the same sums.
    """

    dtype: Any = None
    start: int = 0
    keep: int = 0


_WHOLE, _STACKED = _Recipe(), _Recipe(keep=1)


def fingerprint(params: Params, frozen: Frozen | None = None) -> str:
    """Return the fingerprint of a policy: 32 hex digits, and 32 of the base of an adapter.

    It is a function of names, shapes, dtypes and bits alone.
    """
    return identify(params, frozen)[0]


def fold_params(params: Params, config: DecoderConfig) -> Folded:
    """Return the digests of params as the sampler holds them, in the compute dtype, by layer.

    Weights that an adapter or a scale is still to be added to are left out: sums of products may
    round otherwise from program to program.
    """
    asked = _ask_folded(params, config)
    return dict(zip(asked, _fold_arrays(list(asked.values())), strict=True))


def identify(
    params: Params,
    frozen: Frozen | None,
    whole: Params | None = None,
    config: DecoderConfig | None = None,
) -> tuple[str, Folded]:
    """Return `fingerprint`, and `fold_params` of `whole`, by one read of arrays that both have."""
    trees = [params] if frozen is None else [params, frozen.base]
    found = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
    named = [[(jax.tree_util.keystr(path), leaf) for path, leaf in leaves] for leaves in found]
    asked = _ask_folded(whole, config) if whole is not None and config is not None else {}
    own = [
        (leaf, _STACKED if name.startswith("['layers']") and leaf.ndim else _WHOLE)
        for leaves in named
        for name, leaf in leaves
    ]
    folded = _fold_arrays([*own, *asked.values()])
    sums = iter(folded[: len(own)])
    hashes = [_hash_sums([(name, leaf, next(sums)) for name, leaf in leaves]) for leaves in named]
    return "+".join(hashes), dict(zip(asked, folded[len(own) :], strict=True))


def _hash_sums(leaves: Sequence[tuple[str, Any, np.ndarray]]) -> str:
    """Return the fingerprint of a tree from its leaves' names, arrays and sums."""
    rows = [
        [name, list(leaf.shape), str(leaf.dtype), _join(sums).tolist()]
        for name, leaf, sums in leaves
    ]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:32]


def _join(sums: np.ndarray) -> np.ndarray:
    """Return the sums u32[2] of a whole array from those of its layers."""
    joined: np.ndarray = sums.reshape(2, -1).sum(axis=1, dtype=np.uint32)
    return joined


def _ask_folded(params: Params, config: DecoderConfig) -> dict[str, tuple[Any, _Recipe]]:
    """Return what `fold_params` adds up, by name, in one order in all processes.

    Devices exchange sums in the order of the program, which must not differ between processes (as
    the order of a set of names does).
    """
    spec = make_spec(config)
    stacked = _Recipe(config.compute_dtype, start=1, keep=1)
    asked = {
        f"layers.{name}": (leaf, stacked)
        for name, leaf in params["layers"].items()
        if isinstance(leaf, jax.Array) and name in spec["layers"]
    }
    outer = _Recipe(config.compute_dtype)
    return asked | {name: (params[name], outer) for name in spec if name != "layers"}


# --------------------------------------------------------------------------- the sampler's


def fold_weights(
    weights: Params, config: DecoderConfig, names: Collection[str] | None = None
) -> Folded:
    """Return the same digests of `weights`, those of `models.cache.unstack_layers`.

    Args:
      names: the only ones that are asked for.
    """
    spec = make_spec(config)
    shapes = {name: leaf.shape[1:] for name, leaf in spec.pop("layers").items()}
    inner = tuple(name for name in shapes if names is None or f"layers.{name}" in names)
    outer = {name: weights[name] for name in spec if names is None or name in names}
    folded = dict(
        zip(outer, _fold_arrays([(leaf, _WHOLE) for leaf in outer.values()]), strict=True)
    )
    if not inner:
        return folded
    settings = (tuple(shapes.items()), inner)
    # Layer by layer: they share one program.
    layers = [_run(_sum_layer, layer, *settings) for layer in weights["layers"]]
    return folded | {
        f"layers.{name}": np.stack([one[name] for one in layers], -1) for name in inner
    }


def _sum_layer(
    layer: Params, shapes: Sequence[tuple[str, tuple[int, ...]]], names: Sequence[str], xp: Any
) -> dict[str, Any]:
    """Return the sums of a layer's weights by their names in the spec."""
    parts = _split_joint(layer, dict(shapes))
    return {name: _sum_bits(parts[name], _WHOLE, xp) for name in names}


def find_other(expected: Folded, found: Folded) -> list[str]:
    """Return the names of the weights that are not as expected, with the layers of stacked ones."""
    names = []
    for name, sums in sorted(expected.items()):
        wrong = np.atleast_1d(np.any(sums != found[name], axis=0))
        if wrong.any():
            layers = ", ".join(map(str, np.flatnonzero(wrong))) if sums.ndim > 1 else ""
            names.append(f"{name} (layers {layers})" if layers else name)
    return names


def _split_joint(layer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


def _fold_arrays(asked: Sequence[tuple[Any, _Recipe]]) -> list[np.ndarray]:
    """Return the sums u32[2, *kept axes] of arrays; one that is there twice is passed once."""
    arrays = {id(leaf): leaf for leaf, _ in asked}
    places = {name: at for at, name in enumerate(arrays)}
    plan = tuple((places[id(leaf)], recipe) for leaf, recipe in asked)
    found: list[np.ndarray] = _run(_sum_arrays, list(arrays.values()), plan)
    return found


def _sum_arrays(arrays: Sequence[Any], plan: Sequence[tuple[int, _Recipe]], xp: Any) -> list[Any]:
    return [_sum_bits(arrays[place], recipe, xp) for place, recipe in plan]


def _run(program: Callable[..., Any], tree: Tree, *settings: Hashable) -> Any:
    """Return `program(tree, *settings, xp)` as numpy arrays; small trees are read by the host."""
    leaves = jax.tree.leaves(tree)
    placed = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    is_here = all(leaf.is_fully_addressable for leaf in placed)
    small = sum(leaf.size for leaf in leaves) <= _SMALL and jax.default_backend() == "cpu"
    if is_here and small:
        with np.errstate(over="ignore"):  # of numbers, not of arrays, which wrap silently
            return program(jax.tree.map(np.asarray, tree), *settings, xp=np)
    found = (leaf.sharding.mesh for leaf in placed if isinstance(leaf.sharding, NamedSharding))
    return jax.device_get(_compile(program, next(found, None), settings)(tree))


@functools.lru_cache(maxsize=64)
def _compile(program: Callable[..., Any], mesh: Any, settings: tuple[Hashable, ...]) -> Any:
    def add_up(tree: Tree) -> Any:
        return program(tree, *settings, xp=jnp)

    # The host reads the sums, on every process.
    placed = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(add_up, out_shardings=placed)


def _sum_bits(x: Any, recipe: _Recipe, xp: Any) -> Any:
    """Return the two sums of an array's mixed bits, over all axes but those that are kept.

    `xp` is numpy or jax.numpy: both give the same.
    """
    bits = _take_bits(x if recipe.dtype is None else x.astype(recipe.dtype), xp)
    axes = tuple(range(recipe.keep, bits.ndim))
    sums = []
    for factor, *factors in _FACTORS:
        mixed = bits * xp.uint32(factor)
        for axis in range(recipe.start, bits.ndim):
            shape = [1] * bits.ndim
            shape[axis] = -1
            index = xp.arange(bits.shape[axis], dtype=xp.uint32).reshape(shape)
            mixed = mixed + index * xp.uint32(factors[(axis - recipe.start) % len(factors)])
        mixed = (mixed ^ (mixed >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
        mixed = mixed ^ (mixed >> xp.uint32(16))
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
