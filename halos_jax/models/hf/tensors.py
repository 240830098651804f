"""How one array of ours stands in a checkpoint: its name there, its axes, and its part of a tensor.

A key table maps our paths to `Tensor`s. Several paths may share one tensor of the checkpoint
(fused projections): they name it with the same `fused` tuple, and `bind_tensors` works out which
rows of it belong to whom.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a fused axis that are one array's: `[:, start:stop]` of `[blocks, size]`."""

    blocks: int
    size: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a layer (or of the whole model) as it stands in a checkpoint.

    `axes` gives, for each axis of the checkpoint's tensor, the axes of ours that are flattened
    into it: ((1, 2), (0,)) is a weight [N * H, D] of our array [D, N, H]. In `name`, "{layer}"
    stands for the number of the layer, and "{expert}" for that of the expert: our array has an
    axis for each in front, of which `axes` and the shapes below know nothing. `fused` lists the
    paths of all arrays in the tensor, one behind the other along its axis `fused_axis`, or
    `by_head`: all of the first head, then all of the second. (Where that axis is one of ours and
    not several flattened ones, each element is such a head: the arrays are interleaved.)
    """

    name: str
    axes: tuple[tuple[int, ...], ...]
    fused: tuple[str, ...] = ()
    by_head: bool = False
    fused_axis: int = 0
    rows: Rows | None = None  # of a fused tensor, once it is bound

    @property
    def num_stacked(self) -> int:
        """The number of axes of ours, in front, whose elements are tensors of their own."""
        return ("{layer}" in self.name) + ("{expert}" in self.name)

    def name_at(self, index: Sequence[int]) -> str:
        """Return the name of the tensor at `index` of the axes in front: (), (layer,), ..."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the checkpoint's tensor for our `shape` (without the layer axis)."""
        own = [math.prod(shape[axis] for axis in group) for group in self.axes]
        if self.rows is not None:
            own[self.fused_axis] = self.rows.blocks * self.rows.size
        return tuple(own)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Return our whole array in the checkpoint's layout; of a fused tensor only its part."""
        order = [axis for group in self.axes for axis in group]
        sizes = [math.prod(array.shape[axis] for axis in group) for group in self.axes]
        return array.transpose(order).reshape(sizes)

    def read(
        self, shape: tuple[int, ...], index: Index, get: Callable[[Index], np.ndarray]
    ) -> np.ndarray:
        """Return `ours[index]`, where `get` reads a block of the checkpoint's tensor.

        Only the wanted rows of each group's first axis are read; what else `index` cuts away is
        cut afterwards.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, shape)]
        block, sizes, cut_after = [], [], []
        for first, *rest in self.axes:
            inner = math.prod(shape[axis] for axis in rest)
            start, stop = bounds[first]
            block.append(slice(start * inner, stop * inner))
            sizes += [stop - start, *(shape[axis] for axis in rest)]
            cut_after += [slice(None), *(slice(*bounds[axis]) for axis in rest)]
        order = [axis for group in self.axes for axis in group]
        wanted = self._get(tuple(block), get).reshape(sizes)[tuple(cut_after)]
        return wanted.transpose(np.argsort(order))

    def _get(self, block: Index, get: Callable[[Index], np.ndarray]) -> np.ndarray:
        """Read `block` of what the tensor would be if it held this array alone."""
        rows, axis = self.rows, self.fused_axis
        if rows is None:
            return get(block)
        before, wanted, after = block[:axis], block[axis], block[axis + 1 :]
        if rows.blocks == 1:
            bounds = slice(rows.start + wanted.start, rows.start + wanted.stop)
            return get((*before, bounds, *after))
        own = rows.stop - rows.start  # a block that is wanted is wanted whole: it is a head
        bounds = slice(wanted.start // own * rows.size, wanted.stop // own * rows.size)
        whole = _split_axis(get((*before, bounds, *after)), axis, rows.size)
        picked = whole[(slice(None),) * (axis + 1) + (slice(rows.start, rows.stop),)]
        return _merge_axis(picked, axis)


def _split_axis(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return `array` with `axis` split into two, the second of `size`."""
    return array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])


def _merge_axis(array: np.ndarray, axis: int) -> np.ndarray:
    """Return `array` with `axis` and the next one flattened into one."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


VECTOR = ((0,),)
MATRIX = ((0,), (1,))
TRANSPOSED = ((1,), (0,))  # torch keeps [out, in]
HEADS = ((0, 1),)  # [N, H] as [N * H]
TO_HEADS = ((1, 2), (0,))  # [D, N, H] as [N * H, D]
FROM_HEADS = ((2,), (0, 1))  # [N, H, D] as [D, N * H]
STACKED = ((0,), (1,), (2,))  # [E, D, F] as it is, all experts in one tensor


def bind_tensors(
    table: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the tensor of each path in `shapes` (without the layer axis), fused ones with rows."""
    return {path: _bind(path, table, shapes) for path in shapes}


def _bind(path: str, table: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    tensor = table[path]
    if not tensor.fused:
        return tensor
    along = tensor.axes[tensor.fused_axis]
    blocks = shapes[path][along[0]] if tensor.by_head else 1
    sizes = [
        math.prod(shapes[other][axis] for axis in table[other].axes[tensor.fused_axis]) // blocks
        for other in tensor.fused
    ]
    place = tensor.fused.index(path)
    start = sum(sizes[:place])
    return dataclasses.replace(tensor, rows=Rows(blocks, sum(sizes), start, start + sizes[place]))


def join_parts(parts: Sequence[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """Return the checkpoint's tensor of which `parts` are all arrays, in our layout."""
    if len(parts) == 1:
        ((tensor, array),) = parts
        return tensor.to_theirs(array)
    bound = [(tensor.rows, tensor, array) for tensor, array in parts if tensor.rows is not None]
    ordered = sorted(bound, key=lambda part: part[0].start)
    rows, first, _ = ordered[0]
    axis, blocks = first.fused_axis, rows.blocks
    theirs = [tensor.to_theirs(array) for _, tensor, array in ordered]
    split = [_split_axis(part, axis, part.shape[axis] // blocks) for part in theirs]
    return _merge_axis(np.concatenate(split, axis=axis + 1), axis)
