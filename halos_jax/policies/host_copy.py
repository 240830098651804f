"""Params that every round needs, kept in the host's memory so that files are read once."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from halos_jax.types import Params

_SHARE = 0.5  # of the host's free memory that a copy may take


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


def free_memory() -> int:
    """Return how many bytes of the host's memory nothing uses; 0 where that is not known."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a name that this system knows
        return 0
