"""Params that every round needs, kept in the host's memory so that files are read once."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from halos_jax.types import Params

_SHARE = 0.5  # of the host's free memory that a copy may take
_CONTROL = Path("/sys/fs/cgroup")
_Group = tuple[str, str, str, str]
# Files with the limit of a control group, what it uses, and of what; and the name, in the last one,
# of the part that caches files, which the system gives back: of version 2 and of version 1.
_GROUPS: tuple[_Group, ...] = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclasses.dataclass
class HostCopy:
    """The last params that were loaded, as NumPy arrays with the shardings that they had.

    Nothing is kept where the copy would take more than half of the free memory, and where another
    process of the job holds a part of the params: they are loaded each time.
    """

    _leaves: list[tuple[np.ndarray, jax.sharding.Sharding]] | None = None
    _tree: Any = None

    def load(self, load: Callable[[], Params]) -> Params:
        """Return what `load` returned the first time, in new arrays on the devices.

        Args:
          load: returns the same params at every call.
        """
        if self._leaves is not None:
            arrays = [jax.device_put(leaf, sharding) for leaf, sharding in self._leaves]
            params: Params = jax.tree.unflatten(self._tree, arrays)
            return params
        params = load()
        leaves, tree = jax.tree.flatten(params)
        if _fit(leaves):
            self._leaves = [(np.array(leaf), leaf.sharding) for leaf in leaves]
            self._tree = tree
        return params


def _fit(leaves: list[jax.Array]) -> bool:
    is_whole = all(leaf.is_fully_addressable for leaf in leaves)
    return is_whole and sum(leaf.nbytes for leaf in leaves) <= _SHARE * free_memory()


def free_memory() -> float:
    """Return how many bytes of the host's memory nothing uses; 0 where that is not known.

    A container may have less than its host: then it is what is left of its own limit.
    """
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a name that this system knows
        return 0
    return max(min([free, *map(_read_group, _GROUPS)]), 0)


def _read_group(names: _Group) -> float:
    """Return the bytes that a control group has left; infinity if there is no such limit."""
    try:
        limit, used, stat = ((_CONTROL / name).read_text().split() for name in names[:3])
        cached = dict(zip(stat[::2], map(int, stat[1::2]), strict=True)).get(names[3], 0)
        return int(limit[0]) - int(used[0]) + cached
    except (OSError, ValueError, IndexError):  # no such file, or "max"
        return math.inf
