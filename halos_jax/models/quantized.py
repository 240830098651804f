"""Frozen weights in 8 or 4 bits (Dettmers et al. 2023, QLoRA), through the library qwix.

A quantized weight is stored small and read large: it is turned back into numbers one layer at a
time, where a forward pass or a merge needs them. It never gets a gradient.
"""

import math
from collections.abc import Collection
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from halos_jax.models.hf.families import ModelError

# NormalFloat-4 has a scale for so many weights of an output, int8 one for all of them.
_TILE = 64


@struct.dataclass
class Quantized:
    """A weight of which only `dequantize` knows the form."""

    array: Any  # a qwix.QArray, whose two arrays have the weight's axes: they can be scanned


def quantize(weight: jax.Array, kind: str, inputs: Collection[int]) -> Quantized:
    """Return `weight` as `kind`, "int8" or "nf4"; it stays where it lies.

    Args:
      inputs: the axes that a matrix product sums over. Every output has scales of its own.

    Raises:
      ModelError: if qwix is not installed.
    """
    qwix = _import_qwix()
    outputs = [axis for axis in range(weight.ndim) if axis not in inputs]
    tiles = {}
    if kind == "nf4":
        last = max(inputs)
        tiles = {last: math.gcd(weight.shape[last], _TILE)}
        outputs += [axis for axis in inputs if axis != last]

    sharding = weight.sharding

    def run(weight: jax.Array) -> Quantized:
        wide = weight.astype(jnp.float32)
        made = qwix.quantize(wide, kind, channelwise_axes=outputs, tiled_axes=tiles)
        placed = jax.lax.with_sharding_constraint(made.qvalue, sharding)
        return Quantized(made.replace(qvalue=placed))

    made: Quantized = jax.jit(run)(weight)
    return made


def dequantize(weight: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """Return the numbers of a weight, quantized or not, as `dtype`; made in float32."""
    if isinstance(weight, Quantized):
        numbers: jax.Array = _import_qwix().dequantize(weight.array)
        return numbers.astype(dtype)
    return weight.astype(dtype)


def _import_qwix() -> ModuleType:
    try:
        import qwix
    except ImportError as error:
        raise ModelError(
            "lora.base: 'int8' and 'nf4' need the library qwix, which is not installed; install it "
            "with pip install 'halos_jax[qlora]', or set --config.lora.base=compute"
        ) from error
    module: ModuleType = qwix
    return module
