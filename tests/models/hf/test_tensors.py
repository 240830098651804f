"""Layouts of the key table, whole and block by block, and fused tensors."""

import numpy as np
import pytest

from halos_jax.models.hf.tensors import (
    FROM_HEADS,
    HEADS,
    MATRIX,
    STACKED,
    TO_HEADS,
    TRANSPOSED,
    VECTOR,
    Tensor,
    bind_tensors,
    join_parts,
)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (VECTOR, (5,), lambda x: x),
        (HEADS, (4, 3), lambda x: x.reshape(12)),
        (MATRIX, (4, 6), lambda x: x),
        (TRANSPOSED, (4, 6), lambda x: x.T),
        (TO_HEADS, (8, 4, 3), lambda x: x.reshape(8, 12).T),
        (FROM_HEADS, (4, 3, 8), lambda x: x.reshape(12, 8).T),
    ],
)
def test_layouts_and_their_blocks(axes, shape, expected):
    tensor = Tensor("x", axes)
    ours = np.arange(np.prod(shape)).reshape(shape)
    theirs = tensor.to_theirs(ours)
    np.testing.assert_array_equal(theirs, expected(ours))
    assert tensor.shape_of(shape) == theirs.shape

    reads = []

    def get(block):
        reads.append(theirs[block].size)
        return theirs[block]

    whole = (slice(None),) * len(shape)
    np.testing.assert_array_equal(tensor.read(shape, whole, get), ours)
    for axis, size in enumerate(shape):
        index = list(whole)
        index[axis] = slice(size // 2, size)
        block = tensor.read(shape, tuple(index), get)
        np.testing.assert_array_equal(block, ours[tuple(index)])
        if axis in {group[0] for group in axes}:
            assert reads[-1] == block.size  # nothing is read that is not asked for


SHAPES = {"q": (8, 4, 3), "k": (8, 2, 3), "v": (8, 2, 3)}


def make_fused(shapes, axes, by_head, fused_axis=0):
    """Return arrays of different numbers, and the bound tensors that fuse them."""
    table = dict.fromkeys(shapes, Tensor("x", axes, tuple(shapes), by_head, fused_axis))
    arrays = {
        name: 1000 * number + np.arange(np.prod(shape)).reshape(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }
    return arrays, bind_tensors(table, shapes)


def fuse_by_head(arrays):
    """Return [heads * 3 * H, ...] of weights [D, heads, H] or biases [heads, H]."""
    heads_first = [np.moveaxis(x, 0, -1) if x.ndim == 3 else x for x in arrays]
    return np.stack(heads_first, axis=1).reshape(-1, *heads_first[0].shape[2:])


@pytest.mark.parametrize(
    ("shapes", "axes", "by_head"),
    [
        (SHAPES, TO_HEADS, False),
        ({"gate": (8, 6), "up": (8, 6)}, TRANSPOSED, False),
        (dict.fromkeys("qkv", (8, 4, 3)), TO_HEADS, True),
        (dict.fromkeys("qkv", (4, 3)), HEADS, True),
    ],
    ids=["qkv", "gate_up", "heads", "biases"],
)
def test_fused_tensors_are_joined_and_read_by_block(shapes, axes, by_head):
    arrays, bound = make_fused(shapes, axes, by_head)
    # In any order: each array knows its place.
    theirs = join_parts([(bound[name], arrays[name]) for name in reversed(shapes)])
    if by_head:
        expected = fuse_by_head(list(arrays.values()))
    else:
        plain = Tensor("x", axes)
        expected = np.concatenate([plain.to_theirs(array) for array in arrays.values()])
    np.testing.assert_array_equal(theirs, expected)
    for name, shape in shapes.items():
        assert bound[name].shape_of(shape) == theirs.shape
        for axis, size in enumerate(shape):
            for cut in (slice(None), slice(size // 2, size), slice(0, size // 2)):
                index = [slice(None)] * len(shape)
                index[axis] = cut
                block = bound[name].read(shape, tuple(index), theirs.__getitem__)
                np.testing.assert_array_equal(block, arrays[name][tuple(index)])


@pytest.mark.parametrize("by_head", [True, False], ids=["interleaved", "in a row"])
@pytest.mark.parametrize(("axes", "shape"), [(STACKED, (3, 4, 6)), (MATRIX, (3, 6))])
def test_tensors_are_fused_along_their_last_axis(axes, shape, by_head):
    last = len(shape) - 1
    shapes = {"gate": shape, "up": shape}
    arrays, bound = make_fused(shapes, axes, by_head, last)
    gate, up = arrays.values()
    expected = np.concatenate([gate, up], axis=-1)
    if by_head:
        expected[..., ::2], expected[..., 1::2] = gate, up
    theirs = join_parts([(bound[name], arrays[name]) for name in ("up", "gate")])
    np.testing.assert_array_equal(theirs, expected)
    for name in shapes:
        assert bound[name].shape_of(shape) == theirs.shape
        for cut in np.ndindex(*[3] * len(shape)):  # each axis whole, its first or its second half
            index = tuple(
                (slice(0, size), slice(0, size // 2), slice(size // 2, size))[number]
                for number, size in zip(cut, shape, strict=True)
            )
            block = bound[name].read(shape, index, theirs.__getitem__)
            np.testing.assert_array_equal(block, arrays[name][index])


def test_a_tensor_of_its_own_is_bound_as_it_is():
    tensor = Tensor("x", VECTOR)
    assert bind_tensors({"a": tensor, "b": tensor}, {"a": (3,)}) == {"a": tensor}
    np.testing.assert_array_equal(join_parts([(tensor, np.arange(3))]), np.arange(3))
