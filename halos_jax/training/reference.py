"""The passes of a reference that is a model of its own, in its own architecture."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig
from halos_jax.training.inputs import compile_logps
from halos_jax.training.loop import Trainer
from halos_jax.types import Batch, Params


def refer(trainer: Trainer, decoder: DecoderConfig | None) -> Trainer:
    """Return the trainer with which the log-probabilities of the reference are computed.

    Args:
      decoder: the architecture of a reference that is a model of its own; None: it is an earlier
        state of what is trained, as `trainer` runs it.
    """
    if decoder is None:
        return trainer
    plain = _strip(decoder)
    if plain == _strip(trainer.decoder):  # one program for both
        return dataclasses.replace(trainer, frozen=None)
    own = dataclasses.replace(trainer, decoder=plain, frozen=None)
    return dataclasses.replace(own, logps=_compile(plain, trainer.mesh))


def _strip(decoder: DecoderConfig) -> DecoderConfig:
    """Return a decoder without what says how it is held, and which rows are made as it loads."""
    return dataclasses.replace(
        decoder, params_dtype="float32", remat="none", new_rows=(), new_rows_init="mean"
    )


@functools.lru_cache(maxsize=2)
def _compile(
    decoder: DecoderConfig, mesh: Mesh
) -> Callable[[Params, Frozen | None, Batch], jax.Array]:
    return compile_logps(decoder, mesh)
