"""Weights stored as MXFP4 (Open Compute Project 2023, Microscaling Formats), read as numbers.

A matrix `NAME` of experts is in the checkpoint as `NAME_blocks`, two values of four bits a byte,
and `NAME_scales`, the exponent of each 32 of them. Both are read and turned back slice by slice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from halos_jax.integers import divide_up
from halos_jax.json_text import JsonObject
from halos_jax.models.hf.families import ModelError

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # values that share a scale
_BIAS = 127  # of the scales' exponents
# Of the four bits the first is the sign; in a byte, the lower half comes first.
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)


def _make_table() -> np.ndarray:
    """Return u32[256 * 256]: of each scale and byte the two numbers, in bfloat16, as one."""
    with np.errstate(over="ignore", invalid="ignore"):  # the largest scales stand for no number
        factors = np.ldexp(np.float32(1), np.arange(256) - _BIAS)
        values = (factors[:, None, None] * _PAIRS).astype(ml_dtypes.bfloat16)
    table: np.ndarray = values.view(np.uint32).reshape(-1)
    return table


_TABLE = _make_table()


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor `[E, in, out]` that is read by slices, like those of safetensors.

    Its `blocks` are u8[E, out, in / 32, 16], its `scales` u8[E, out, in / 32].
    """

    blocks: Any
    scales: Any

    def get_shape(self) -> list[int]:
        """Return `[E, in, out]`."""
        experts, outputs, groups = self.scales.get_shape()
        return [experts, groups * _BLOCK, outputs]

    def get_dtype(self) -> str:
        """Return the type that holds every value exactly."""
        return "BF16"

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        """Return a block of the numbers, in bfloat16."""
        experts, inputs, outputs = (
            range(*cut.indices(size)) for cut, size in zip(index, self.get_shape(), strict=True)
        )
        groups = slice(inputs.start // _BLOCK, divide_up(inputs.stop, _BLOCK))
        first = inputs.start - groups.start * _BLOCK
        made = np.empty((len(experts), len(outputs), len(inputs)), ml_dtypes.bfloat16)
        rows = slice(outputs.start, outputs.stop)
        for number, expert in enumerate(experts):  # one by one: on the way they are larger
            own = slice(expert, expert + 1)
            blocks, scales = (part[own, rows, groups] for part in (self.blocks, self.scales))
            values = unpack(blocks, scales)
            made[number] = values[0, :, first : first + len(inputs)]
        return made.swapaxes(1, 2)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the numbers bf16[..., G * 32] of `blocks u8[..., G, 16]` and `scales u8[..., G]`."""
    index = (scales.astype(np.uint16) << 8)[..., None] | blocks
    numbers: np.ndarray = _TABLE[index].view(ml_dtypes.bfloat16)
    return numbers.reshape(*scales.shape[:-1], -1)


def unpack_tensors(tensors: Mapping[str, Any]) -> JsonObject:
    """Return `tensors` with one `Packed` in place of each pair of blocks and scales.

    Raises:
      ModelError: if a half of a pair is missing, or the two do not fit.
    """
    found, problems = dict(tensors), []
    halves = [name for name in tensors if name.endswith((_BLOCKS, _SCALES))]
    for name in sorted({name.removesuffix(_BLOCKS).removesuffix(_SCALES) for name in halves}):
        blocks, scales = (found.pop(name + end, None) for end in (_BLOCKS, _SCALES))
        if blocks is None or scales is None:
            lacking = _BLOCKS if blocks is None else _SCALES
            problems.append(f"{name}{lacking}: missing, though its other half is there")
            continue
        shape, other = tuple(blocks.get_shape()), tuple(scales.get_shape())
        types = {blocks.get_dtype(), scales.get_dtype()}
        if types != {"U8"} or len(other) != 3 or shape != (*other, _BLOCK // 2):
            problems.append(
                f"{name}: got blocks {shape} and scales {other} of type "
                f"{' and '.join(sorted(types))}, allowed: (experts, rows, groups, {_BLOCK // 2}) "
                "and (experts, rows, groups) of type U8"
            )
            continue
        found[name] = Packed(blocks, scales)
    if problems:
        raise ModelError(
            "the weights in MXFP4 cannot be read:\n  "
            + "\n  ".join(problems)
            + "\nDownload the model again, or use its folder in bfloat16."
        )
    return found
