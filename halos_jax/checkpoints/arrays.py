"""The arrays of a checkpoint by name, and how two sets of arrays differ."""

from collections.abc import Mapping
from typing import Any

import jax


def name_arrays(tree: Any) -> dict[str, Any]:
    """Map names like "params/layers/q" to the leaves of `tree`, in the order of the tree."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}: got {type(leaf).__name__}, allowed: arrays")
        leaves[name] = leaf
    return leaves


def describe_array(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Return the shape of an array and the name of its dtype."""
    return tuple(leaf.shape), str(jax.numpy.dtype(leaf.dtype))


def compare_arrays(
    wanted: Mapping[str, Any], found: Mapping[str, Any], wanted_by: str, found_in: str
) -> list[str]:
    """Return a line for each array that is missing, extra, or has another shape or dtype."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            lines.append(f"{name}: missing ({wanted_by}: {_format(wanted[name])})")
        elif name not in wanted:
            lines.append(f"{name}: extra ({found_in}: {_format(found[name])})")
        elif wanted[name] != found[name]:
            lines.append(
                f"{name}: {wanted_by} {_format(wanted[name])}, {found_in} {_format(found[name])}"
            )
    return lines


def _format(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]}{list(spec[0])}"
