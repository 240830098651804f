"""The vocabulary: rows of embedding and head for tokens that a checkpoint does not have yet.

A new row is a function of the checkpoint alone. So policy and reference, which read the same
checkpoint, have the same rows, and so has a run that is resumed.
"""

import dataclasses
import functools
import itertools
import logging
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from halos_jax.config import ModelConfig
from halos_jax.integers import round_up
from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig

logger = logging.getLogger(__name__)

PATHS = ("embed", "head")  # the params that have a row for each token
_TILE = 4096  # rows read at one time


def fit_vocab(
    config: DecoderConfig,
    vocabulary: Mapping[str, int],
    new_tokens: Collection[str],
    settings: ModelConfig,
) -> DecoderConfig:
    """Return `config` with a row for every token of `vocabulary` (token -> id).

    A vocabulary with rows to spare (many are padded) stays as long as it is; one that is too
    short grows to a multiple of `settings.pad_vocab_to`. None shrinks.

    Args:
      new_tokens: those that the model has not been trained on, wherever their rows are.

    Raises:
      ModelError: if tokens without a row are not in `settings.added_tokens`: model and
        tokenizer do not belong together, and a look-up would silently take another token's row.
    """
    beyond = {token: row for token, row in vocabulary.items() if row >= config.vocab_size}
    unasked = sorted(beyond.keys() - set(settings.added_tokens), key=beyond.__getitem__)
    if unasked and not settings.random_init:
        listed = ", ".join(map(repr, unasked[:5])) + (", ..." if len(unasked) > 5 else "")
        raise ModelError(
            f"the tokenizer has {len(unasked)} tokens ({listed}) beyond the {config.vocab_size} "
            f"rows of the embedding of {settings.path!r}; allowed: a row for every token; set "
            "model.tokenizer to the model's own, or name them in model.added_tokens to train them"
        )
    size = config.vocab_size
    if beyond:
        multiple = settings.pad_vocab_to
        size = round_up(max(beyond.values()) + 1, multiple)
        logger.info("vocabulary: from %d to %d rows", config.vocab_size, size)
    return dataclasses.replace(
        config,
        vocab_size=size,
        new_rows=tuple(sorted(vocabulary[token] for token in new_tokens)),
        new_rows_init=settings.added_tokens_init,
    )


def check_ids(largest: int, config: DecoderConfig, path: str) -> None:
    """Raise a ModelError where `largest`, a token id for the model at `path`, has no row."""
    if largest >= config.vocab_size:
        raise ModelError(
            f"{path}: its tokenizer gave the token {largest}, but the embedding has "
            f"{config.vocab_size} rows; use the tokenizer and the weights of one and the same model"
        )


def find_unknown(known: Iterable[int], size: int) -> tuple[tuple[int, int], ...]:
    """Return the ids below `size` that are not `known`, as ranges [start, stop) in order."""
    bounds = [-1, *sorted({number for number in known if 0 <= number < size}), size]
    return tuple(
        (before + 1, after) for before, after in itertools.pairwise(bounds) if before + 1 < after
    )


def add_rows(name: str, tensor: Any, config: DecoderConfig) -> Any:
    """Return `tensor [rows, D]`, which is read by slices, with the new rows of `config` in it."""
    if tensor.get_shape()[0] == config.vocab_size and not config.new_rows:
        return tensor
    return _Grown(name, tensor, config)


class _Grown:
    """A tensor of a checkpoint whose new rows are made and not read."""

    def __init__(self, name: str, tensor: Any, config: DecoderConfig):
        self._name, self._tensor, self._config = name, tensor, config
        self._stored = tensor.get_shape()[0]
        padding = range(self._stored, config.vocab_size)
        self._new = sorted({*config.new_rows, *padding})

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        start, stop, kept = rows.start, rows.stop, min(rows.stop, self._stored)
        width = len(range(*columns.indices(self._config.d_model)))
        made = np.empty((stop - start, width), np.float32)
        if start < kept:  # a device may hold new rows alone, and a file has no empty slices
            made[: kept - start] = self._tensor[start:kept, columns]
        for row in self._new:
            if start <= row < stop:
                made[row - start] = self._make_row(row)[columns]
        return made

    def _make_row(self, row: int) -> np.ndarray:
        if self._config.new_rows_init == "mean":
            return self._mean
        # The seed is of this row of this tensor, so that neither order nor count plays a part.
        generator = np.random.default_rng([zlib.crc32(self._name.encode()), row])
        return self._config.init_std * generator.standard_normal(self._config.d_model)

    @functools.cached_property
    def _mean(self) -> np.ndarray:
        """The mean f64[D] of the rows of known tokens; what follows the last one is padding."""
        known = min(self._new[0], self._stored)
        total = np.zeros(self._config.d_model)
        for start in range(0, known, _TILE):
            tile = self._tensor[start : min(start + _TILE, known)]
            total += tile.astype(np.float64).sum(axis=0)
        mean: np.ndarray = total / known
        return mean
