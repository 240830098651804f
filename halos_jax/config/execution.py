"""How a decoder is run: the fields that `config.model` and a model's `DecoderConfig` share."""

import dataclasses
from typing import Literal

from halos_jax.config.bounds import PositiveInt
from halos_jax.config.roles import execution

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["auto", "none", "full", "attention", "gate", "matmuls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Both records have these fields by inheritance, which is why no list names them.

    A new switch is a field here, and whatever reads it of the decoder's config.
    """

    params_dtype: Dtype = "float32"  # the master weights
    compute_dtype: Dtype = "bfloat16"  # activations, and weights as they are used
    # Who computes attention: XLA, cuDNN (GPU) or splash (TPU); "auto": the fastest that can
    attention: Literal["auto", "xla", "cudnn", "splash"] = execution("auto")
    # What of a block is kept for the backward pass: all, nothing, attention's inputs and outputs,
    # these and the MLP's gate, or all large matrix products; "auto": the fastest that memory holds.
    remat: Remat = execution("auto")
    # Form the logits once more in the backward pass
    head_remat: bool | Literal["auto"] = execution("auto")
    # Faster by some per cent; compiles longer, takes more memory
    unroll_layers: bool = execution(False)
    # Response positions whose logits exist at one time, in float32
    head_chunk: PositiveInt = execution(4096)
