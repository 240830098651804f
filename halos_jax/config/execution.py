"""How a decoder is run: the fields that `config.model` and a model's `DecoderConfig` share."""

import dataclasses
from typing import Literal

from halos_jax.config.bounds import PositiveInt
from halos_jax.config.roles import execution

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["auto", "none", "full", "attention", "gate", "matmuls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How to run a decoder. Both records inherit these fields, so that no list has to name them.

    A new switch is a field here, and the code that reads it from the decoder's config.
    """

    params_dtype: Dtype = "float32"  # dtype of the master weights
    compute_dtype: Dtype = "bfloat16"  # dtype of activations, and of weights as they are used
    # Implementation of attention: XLA, cuDNN (GPU) or splash (TPU); "auto": the fastest available
    attention: Literal["auto", "xla", "cudnn", "splash"] = execution("auto")
    # Activations of a block that are kept for the backward pass, which recomputes the others.
    # "none": no recomputation; "full": keep nothing; "attention": keep attention's inputs and
    # outputs; "gate": these and the MLP's gate; "matmuls": these and its up projection;
    # "auto": the fastest that fits in memory
    remat: Remat = execution("auto")
    # Recompute the logits in the backward pass, which saves memory
    head_remat: bool | Literal["auto"] = execution("auto")
    # Unroll the loop over layers: a few per cent faster, but slower to compile, with more memory
    unroll_layers: bool = execution(False)
    # Response positions whose float32 logits are in memory at the same time
    head_chunk: PositiveInt = execution(4096)
