"""Limits of length: what they cut when texts become items, counted and logged once per source."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from halos_jax.config import Config, ConfigError
from halos_jax.data.chat.renderer import Renderer
from halos_jax.once import say_once
from halos_jax.types import FINISH_LENGTH, Completion, Sample, Turn

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Tally:
    """How many lengths in tokens exceed a limit, and the longest of them."""

    count: int = 0
    over: int = 0
    longest: int = 0

    def add(self, length: int, limit: int) -> None:
        """Count a length; a limit of 0 means no limit."""
        self.count += 1
        self.over += 0 < limit < length
        self.longest = max(self.longest, length)

    def describe(self, noun: str) -> str:
        """Return "3 of 40 prompts (7.5 %, the longest has 1,823 tokens)"."""
        share = 100 * self.over / max(self.count, 1)
        return (
            f"{self.over:,} of {self.count:,} {noun} ({share:.3g} %, the longest has "
            f"{self.longest:,} tokens)"
        )


@dataclasses.dataclass
class Cuts:
    """Tallies of prompts before cutting, and of sequences before and after cutting the answer."""

    prompts: Tally = dataclasses.field(default_factory=Tally)
    wholes: Tally = dataclasses.field(default_factory=Tally)
    sequences: Tally = dataclasses.field(default_factory=Tally)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens: of the prompt, and of prompt and response together.

    A response is truncated if `total` cuts it, or if the sampler's token limit did. With
    `mask_truncated` it carries no loss: a pair, judgement or demonstration (in a conversation, the
    last turn) with such a response is left out, and their number is logged. In a group, its reward
    still counts in the statistics, but none of its tokens is a target.

    `positions` is the number of positions that the model was made for (0: unknown). `cuts` counts
    what is cut. `behind` tokens will be added after each prompt, and count as part of it.
    """

    prompt: int
    total: int
    mask_truncated: bool = False
    positions: int = 0
    cuts: Cuts = dataclasses.field(default_factory=Cuts, compare=False)
    behind: int = 0

    def report(self, source: str) -> None:
        """Log what was cut in `source`."""
        report_prompts(source, self.cuts.prompts, self.prompt)
        if self.cuts.wholes.over:
            say_once(
                logger,
                "%s: %s do not fit train.max_length=%d with their prompts: they lose their end, "
                "and with it the mark that they are finished (train.mask_truncated=true leaves "
                "them out)",
                source,
                self.cuts.wholes.describe("answers"),
                self.total,
            )
        report_positions(source, self.cuts.sequences, self.positions)


def make_lengths(config: Config, positions: int = 0) -> Lengths:
    """Return the limits of a run's training items, for a model with so many positions."""
    train = config.train
    return Lengths(
        config.sampling.max_prompt_length, train.max_length, train.mask_truncated, positions
    )


def report_prompts(source: str, prompts: Tally, limit: int) -> None:
    """Warn of prompts that `sampling.max_prompt_length` cuts."""
    if prompts.over:
        say_once(
            logger,
            "%s: %s are longer than sampling.max_prompt_length=%d: they lose their beginning",
            source,
            prompts.describe("prompts"),
            limit,
        )


def report_positions(source: str, sequences: Tally, positions: int) -> None:
    """Warn of sequences that have more tokens than the model has positions for."""
    if sequences.over:
        say_once(
            logger,
            "%s: %s go beyond the %d positions that the model was made for "
            "(max_position_embeddings): what it says there means little",
            source,
            sequences.describe("sequences"),
            positions,
        )


def cut_prompt(
    renderer: Renderer,
    turns: Sequence[Turn],
    whole: Sequence[int],
    lengths: Lengths,
    place: str = "",
) -> Sequence[int]:
    """Return the ids of a prompt, cut if `whole` is too long, and count its length.

    Raises:
      ConfigError: with the place of its record, if no cut makes it short enough.
    """
    length = len(whole) + lengths.behind
    lengths.cuts.prompts.add(length, lengths.prompt)
    if length <= lengths.prompt:
        return whole
    try:
        return renderer.render_prompt(turns, lengths.prompt - lengths.behind)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error


def fit_response(
    ids: Sequence[int] | np.ndarray, prompt_length: int, lengths: Lengths, place: str = ""
) -> np.ndarray:
    """Return `cut_response` for a training item and count its lengths; `place` is its record's."""
    response = cut_response(ids, prompt_length, lengths, place)
    lengths.cuts.wholes.add(prompt_length + len(ids), lengths.total)
    lengths.cuts.sequences.add(prompt_length + len(response), lengths.positions)
    return response


def cut_response(
    ids: Sequence[int] | np.ndarray, prompt_length: int, lengths: Lengths, place: str = ""
) -> np.ndarray:
    """Return a response i32[response] cut to the room that its prompt leaves.

    Raises:
      ConfigError: if that is none.
    """
    room = lengths.total - prompt_length
    if room < 1:
        whose = f"the prompt of {place}" if place else "a prompt"
        raise ConfigError(
            f"train.max_length: got {lengths.total}, but {whose} has {prompt_length} tokens, which "
            "leaves none for its response; raise it, or lower sampling.max_prompt_length, now "
            f"{lengths.prompt}, which holds for every task"
        )
    return np.asarray(ids[:room], np.int32)


def is_truncated(
    lengths: Lengths, origin: Completion | Sample, ids: Sequence[int] | np.ndarray, cut: np.ndarray
) -> bool:
    """Tell whether a response carries no loss because it is truncated and those are masked."""
    truncated = origin.finish_reason == FINISH_LENGTH or len(cut) < len(ids)
    return lengths.mask_truncated and truncated


def report_truncated(count: int, rest: int, what: str) -> None:
    """Log how many truncated examples are left out."""
    if count:
        logger.info("%d of %d %s left out: truncated responses", count, count + rest, what)
