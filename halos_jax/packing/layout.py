"""The static shapes of packed batches: which fit every row of a plan, and recur between plans."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from halos_jax.integers import divide_up, round_up
from halos_jax.packing.transforms import NO_SETS, NOTHING, measure_kept
from halos_jax.types import Item

Buckets: TypeAlias = tuple[tuple[int, int], ...]  # (sequences, length) of each
Steps: TypeAlias = Sequence[Sequence[Sequence[int]]]  # of each step, the items of each row


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shapes of every batch of a plan (see `types.Batch`)."""

    microbatches: int
    rows: int
    tokens: int
    positions: int
    copies: int
    buckets: Buckets
    kept: int = NOTHING  # ids of kept tokens of a position, see `transforms.measure_kept`

    @property
    def num_entries(self) -> int:
        return sum(count * length for count, length in self.buckets)

    @property
    def num_sequences(self) -> int:
        return sum(count for count, _ in self.buckets)


_FEW = 8  # sequences in a bucket, among which one more or less is luck


class LayoutMemory:
    """The layouts that a run's programs are compiled for, by the name of what is planned.

    A plan made with it depends on the plans made before. So it is state of the run: whoever goes
    on must go on from the memory as it was then. An online run has two, which are saved with what
    they belong to: the trainer's in a checkpoint's position, as of its step, and that of a reward
    model in the round's manifest, as of its last stage. A run may stop between the two.
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
            name: [_layout_to_record(layout) for layout in layouts]
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


def _layout_to_record(layout: Layout) -> dict[str, Any]:
    record = dataclasses.asdict(layout) | {"buckets": [list(b) for b in layout.buckets]}
    if layout.kept == NOTHING:
        del record["kept"]
    return record


def fit_layout(
    items: Sequence[Item],
    steps: Steps,
    microbatches: int,
    num_rows: int,
    multiple: int,
    *,
    recurring: bool,
) -> Layout:
    """Return the smallest rounded shapes into which every row of every step fits.

    Shapes that recur with other items are rounded up further, so that the next ones may fit too.
    """
    rows = [[items[index] for index in row] for step in steps for row in step]
    tokens = max(sum(item.num_tokens for item in row) for row in rows)
    positions = max(sum(sum(item.num_targets) for item in row) for row in rows)
    longest = max(_longest(item) for row in rows for item in row)
    parts = 8 if recurring else 32
    return Layout(
        microbatches=microbatches,
        rows=num_rows,
        tokens=round_shape(tokens, multiple, parts=parts),
        positions=round_shape(positions, 8, parts=parts // 2),
        copies=max(len(item.responses) for row in rows for item in row),
        buckets=_fit_buckets(rows, longest, multiple, recurring=recurring),
        kept=measure_kept([item for row in rows for item in row]),
    )


def reuse_layout(items: Sequence[Item], steps: Steps, *, needed: Layout, known: Layout) -> Layout:
    """Return the layout with which programs of the layout `known` recur in another round.

    That is `known` where every row of every step fits into it, or `known` grown by what does not
    fit, so that the rounds after need not compile again; but `needed`, which `fit_layout` gave,
    where the batch is split otherwise or the larger shapes would cost more than a quarter more.
    """
    rows = [[items[index] for index in row] for step in steps for row in step]
    lengths = [length for _, length in known.buckets]
    longest = max(length for row in rows for length in _sequence_lengths(row))
    same = (known.rows, known.microbatches) == (needed.rows, needed.microbatches)
    same &= known.kept == needed.kept or min(known.kept, needed.kept) > NO_SETS
    if not same or longest > lengths[-1]:
        return needed
    buckets = _grow_buckets(known.buckets, _count_longer(rows, lengths), recurring=True)
    grown = dataclasses.replace(
        known,
        tokens=max(known.tokens, needed.tokens),
        positions=max(known.positions, needed.positions),
        copies=max(known.copies, needed.copies),
        buckets=buckets,
        kept=max(known.kept, needed.kept),
    )
    dear = (
        grown.tokens > 1.25 * needed.tokens
        or grown.positions > 1.5 * needed.positions
        or _measure_view(grown.buckets) > 1.5 * _measure_view(needed.buckets)
    )
    return needed if dear else grown


def _fit_buckets(
    rows: Sequence[Sequence[Item]], longest: int, multiple: int, *, recurring: bool
) -> Buckets:
    """Return (sequences, length) buckets that hold every row.

    A sequence may stand in a longer bucket than it needs where its own is full, so a bucket and
    the longer ones together must hold what is too long for the shorter ones. More buckets waste
    less of the view; each is compiled by itself, and is one more shape for another round to miss.
    So the fewest are taken that cost little more than the least.
    """
    longest = round_shape(longest, multiple, parts=8)
    choices = []
    for number in (1, 2, 4) if recurring else (1, 2, 4, 8):
        bounds = (divide_up(longest * part, number) for part in range(1, number + 1))
        lengths = sorted({round_up(bound, multiple) for bound in bounds})
        empty, longer = [(0, length) for length in lengths], _count_longer(rows, lengths)
        buckets = _grow_buckets(empty, longer, recurring=recurring)
        used = tuple(bucket for bucket in buckets if bucket[0])
        choices.append((_measure_view(used), used))
    most = (1.25 if recurring else 1.05) * min(cost for cost, _ in choices)
    return next(buckets for cost, buckets in choices if cost <= most)


def _count_longer(rows: Sequence[Sequence[Item]], lengths: Sequence[int]) -> np.ndarray:
    """Return how many sequences are too long for the buckets before each, of the row with most."""
    most = np.zeros(len(lengths), np.int64)
    for row in rows:
        needed = np.searchsorted(lengths, _sequence_lengths(row))
        counts = np.bincount(needed, minlength=len(lengths))
        most = np.maximum(most, np.cumsum(counts[::-1])[::-1])
    return most


def _grow_buckets(
    buckets: Sequence[tuple[int, int]], longer: np.ndarray, *, recurring: bool
) -> Buckets:
    """Return `buckets` with as many sequences more as `longer` (of `_count_longer`) asks for; of
    those that recur, where it asks for few, with one to spare."""
    grown, held = [], 0
    for (count, length), needed in zip(reversed(buckets), reversed(longer), strict=True):
        missing = int(needed) - held - count
        if missing > 0:
            count += missing + (recurring and count + missing < _FEW)
            count = round_shape(count, 1, parts=2 if recurring else 8)
        held += count
        grown.append((count, length))
    return tuple(reversed(grown))


def _measure_view(buckets: Sequence[tuple[int, int]]) -> int:
    """Return what the view costs, in (query, key) pairs: attention, and moving its entries."""
    return sum(count * length * (length + 512) for count, length in buckets)


def round_shape(size: int, multiple: int, *, parts: int) -> int:
    """Round up to `multiple` times a number of a grid: `parts` steps from one power of 2 on.

    The plan of another round then often finds shapes that are compiled already. The coarser the
    grid, the oftener; so the cheaper axes get the coarser grid: all matrix products see every
    token of a row, the head every position, attention alone the sequences.
    """
    units = max(divide_up(size, multiple), 1)
    grid = max((1 << (units.bit_length() - 1)) // parts, 1)
    return round_up(units, grid) * multiple


def _longest(item: Item) -> int:
    return len(item.prompt_ids) + max(len(response) for response in item.responses)


def _sequence_lengths(row: Sequence[Item]) -> list[int]:
    return [len(item.prompt_ids) + len(response) for item in row for response in item.responses]


def assign_sequences(row: Sequence[Item], layout: Layout) -> list[int]:
    """Return the sequence number of each response of a row, in the order of its items.

    The longest first, each takes the shortest bucket with room for it.
    """
    wanted = np.array(_sequence_lengths(row), np.int64)
    lengths = [length for _, length in layout.buckets]
    counts = [count for count, _ in layout.buckets]
    starts = np.cumsum([0, *counts])
    used = [0] * len(counts)
    numbers = np.zeros(len(wanted), np.int64)
    first = np.searchsorted(lengths, wanted)
    for index in np.argsort(-wanted, kind="stable"):
        bucket = int(first[index])
        while used[bucket] == counts[bucket]:
            bucket += 1
        numbers[index] = starts[bucket] + used[bucket]
        used[bucket] += 1
    return numbers.tolist()
