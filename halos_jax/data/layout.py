"""The static shapes of packed batches: which fit every row of a plan, and recur between plans."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halos_jax.types import Item


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shapes of every batch of a plan (see `types.Batch`)."""

    microbatches: int
    rows: int
    tokens: int
    positions: int
    copies: int
    buckets: tuple[tuple[int, int], ...]

    @property
    def num_slots(self) -> int:
        return sum(count * length for count, length in self.buckets)

    @property
    def num_sequences(self) -> int:
        return sum(count for count, _ in self.buckets)


class LayoutMemory:
    """The layouts that a run's programs are compiled for, by the name of what is planned.

    A plan made with it depends on the plans made before. So it is state of the run: whoever goes
    on from a checkpoint must go on from the memory as it was then.
    """

    _KEPT = 4  # layouts under one name: training, say, and a held-out set that is smaller

    def __init__(self) -> None:
        self._known: dict[str, tuple[Layout, ...]] = {}

    def find(self, name: str) -> tuple[Layout, ...]:
        """Return the layouts under `name`, the last one first."""
        return self._known.get(name, ())

    def keep(self, name: str, layout: Layout) -> None:
        """Put `layout` first under `name`."""
        others = [one for one in self.find(name) if one != layout]
        self._known[name] = (layout, *others)[: self._KEPT]

    def to_record(self) -> dict[str, list[dict[str, Any]]]:
        """Return the memory as plain JSON."""
        return {
            name: [
                dataclasses.asdict(layout) | {"buckets": [list(b) for b in layout.buckets]}
                for layout in layouts
            ]
            for name, layouts in self._known.items()
        }

    def load(self, record: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Replace what is known by what `to_record` gave."""
        self._known = {
            name: tuple(
                Layout(**{**one, "buckets": tuple(map(tuple, one["buckets"]))}) for one in layouts
            )
            for name, layouts in record.items()
        }


def fit_layout(items, steps, microbatches: int, num_rows: int, multiple: int) -> Layout:
    """Return the smallest rounded shapes into which every row of every step fits."""
    rows = [[items[index] for index in row] for step in steps for row in step]
    tokens = max(sum(item.num_tokens for item in row) for row in rows)
    positions = max(sum(sum(item.num_targets) for item in row) for row in rows)
    lengths = _bucket_lengths(max(_longest(item) for row in rows for item in row), multiple)
    return Layout(
        microbatches=microbatches,
        rows=num_rows,
        tokens=round_shape(tokens, multiple, parts=8),
        positions=round_shape(positions, 8, parts=4),
        copies=max(len(item.responses) for row in rows for item in row),
        buckets=_fit_buckets(rows, lengths),
    )


def reuse_layout(items, steps, *, needed: Layout, known: Layout) -> Layout:
    """Return the layout with which programs of the layout `known` recur in another round.

    That is `known` where every row of every step fits into it, or `known` grown by what does not
    fit, so that the rounds after need not compile again; but `needed`, which `fit_layout` gave,
    where the batch is split otherwise or the larger shapes would cost more than a quarter more.
    """
    rows = [[items[index] for index in row] for step in steps for row in step]
    lengths = [length for _, length in known.buckets]
    longest = max(length for row in rows for length in _sequence_lengths(row))
    same = (known.rows, known.microbatches) == (needed.rows, needed.microbatches)
    if not same or longest > lengths[-1]:
        return needed
    buckets = tuple(
        (max(count, round_shape(int(used), 1, parts=2) if used else 0), length)
        for (count, length), used in zip(known.buckets, _count_buckets(rows, lengths), strict=True)
    )
    grown = dataclasses.replace(
        known,
        tokens=max(known.tokens, needed.tokens),
        positions=max(known.positions, needed.positions),
        copies=max(known.copies, needed.copies),
        buckets=buckets,
    )
    dear = (
        grown.tokens > 1.25 * needed.tokens
        or grown.positions > 1.5 * needed.positions
        or _count_scores(grown.buckets) > 1.5 * _count_scores(needed.buckets)
    )
    return needed if dear else grown


def _fit_buckets(rows, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (sequences, length) buckets that hold every row, out of the longest of `lengths`.

    A bucket is as large as the row that fills it most, so several may hold more in all than one
    would. Each is compiled by itself besides, and more counts are more shapes for another round to
    miss. So the fewest buckets are taken whose attention costs little more than the least.
    """
    choices = []
    for first in reversed(range(len(lengths))):
        kept = lengths[first:]
        counts = _count_buckets(rows, kept)
        buckets = tuple(
            (round_shape(int(count), 1, parts=2), length)
            for count, length in zip(counts, kept, strict=True)
            if count
        )
        choices.append((_count_scores(buckets), buckets))
    least = min(cost for cost, _ in choices)
    return next(buckets for cost, buckets in choices if cost <= 1.25 * least)


def _count_buckets(rows, lengths: Sequence[int]) -> np.ndarray:
    """Return how many sequences each bucket must hold, for the row that fills it most."""
    counts = np.zeros(len(lengths), np.int64)
    for row in rows:
        used = [_bucket_of(length, lengths) for length in _sequence_lengths(row)]
        counts = np.maximum(counts, np.bincount(used, minlength=len(lengths)))
    return counts


def _count_scores(buckets: Sequence[tuple[int, int]]) -> int:
    """Return what attention over the buckets costs, in (query, key) pairs."""
    return sum(count * length**2 for count, length in buckets)


def round_shape(size: int, multiple: int, *, parts: int) -> int:
    """Round up to `multiple` times a number of a grid: `parts` steps from one power of 2 on.

    The plan of another round then often finds shapes that are compiled already. The coarser the
    grid, the oftener; so the cheapest axes get the coarsest grid: all matrix products see every
    token of a row (at most 1/8 of waste), the head every position, attention alone the sequences.
    """
    units = max(-(-size // multiple), 1)
    grid = max((1 << (units.bit_length() - 1)) // parts, 1)
    return -(-units // grid) * grid * multiple


def _bucket_lengths(longest: int, multiple: int) -> list[int]:
    """Return up to three rising sequence lengths: the longest, its half and its quarter."""
    longest = round_shape(longest, multiple, parts=8)
    rounded = {-(-max(longest >> shift, 1) // multiple) * multiple for shift in range(3)}
    return sorted(rounded)


def _bucket_of(length: int, lengths: Sequence[int]) -> int:
    return int(np.searchsorted(lengths, length))


def _longest(item: Item) -> int:
    return len(item.prompt_ids) + max(len(response) for response in item.responses)


def _sequence_lengths(row: Sequence[Item]) -> list[int]:
    return [len(item.prompt_ids) + len(response) for item in row for response in item.responses]


def assign_sequences(row: Sequence[Item], layout: Layout) -> list[int]:
    """Return the sequence number of each response of a row, in the order of its items."""
    lengths = [length for _, length in layout.buckets]
    starts = np.cumsum([0] + [count for count, _ in layout.buckets])
    used = [0] * len(lengths)
    numbers = []
    for length in _sequence_lengths(row):
        bucket = _bucket_of(length, lengths)
        numbers.append(int(starts[bucket]) + used[bucket])
        used[bucket] += 1
    return numbers
