"""Head and embedding that are one array, or that a checkpoint holds as two whatever it says.

As transformers 5 does: a head that is stored under a config that ties is a head of its own where
its values are others. Of two that are equal one is read, and one that stands for both is both.
"""

from typing import Any

import numpy as np

from halos_jax.models.files.weight_files import Tensors
from halos_jax.models.hf.family_table import Family

_TILE = 4096  # rows compared at one time


def has_own_head(tensors: Tensors, family: Family) -> bool:
    """Tell whether a checkpoint holds a head that is another array than its embedding."""
    embed, head = (tensors.get(family.tensors[path].name) for path in ("embed", "head"))
    if embed is None or head is None:
        return False
    if embed.get_shape() != head.get_shape():
        return True
    count = embed.get_shape()[0]
    tiles = [slice(row, min(row + _TILE, count)) for row in range(0, count, _TILE)]
    return any(_differ(embed[tile], head[tile]) for tile in tiles)


def _differ(one: Any, other: Any) -> bool:
    if one.dtype != other.dtype:
        one, other = (part.astype(np.float64) for part in (one, other))
    return bool(one.tobytes() != other.tobytes())  # by its bits: a NaN is equal to itself here


def share_embedding(tensors: Tensors, family: Family) -> Tensors:
    """Return the tensors of a tied checkpoint with the embedding, if only the head is stored."""
    embed, head = (family.tensors[path].name for path in ("embed", "head"))
    if embed in tensors or head not in tensors:
        return tensors
    return {embed if name == head else name: one for name, one in tensors.items()}
