"""From training items to packed batches: a plan of all steps, then one batch a step.

The plan fixes which items make up each optimizer step, in which row each stands, and one set of
array shapes that fits every step, so that a stage compiles once. A batch holds whole items: the
loss of a step never depends on how its items were packed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.types import (
    CHOSEN,
    PADDING,
    REJECTED,
    Batch,
    Item,
    Sequences,
    View,
)


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which items each step holds: `steps[i][j]` lists the items in row j of step i."""

    layout: Layout
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    fill: float  # share of the planned tokens that are real

    def __len__(self) -> int:
        return len(self.steps)


def order_items(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order i64[count] in which an epoch takes the items."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def plan_batches(
    items: Sequence[Item],
    *,
    batch_size: int,
    num_rows: int,
    tokens_per_row: int,
    row_multiple: int = 128,
    seed: int | None = None,
    epochs: int = 1,
) -> Plan:
    """Plan the packing of `epochs` passes over `items`.

    Args:
      items: what to train on; must not be empty.
      batch_size: items of an optimizer step; the last step of an epoch may hold fewer.
      num_rows: rows of a microbatch, one a device group.
      tokens_per_row: longest allowed row; a step that needs more becomes several microbatches.
      row_multiple: row and sequence lengths are rounded up to multiples of this.
      seed: order of each epoch; None keeps the items' own order.

    Raises:
      ConfigError: where `items` is empty or an item is longer than a row.
      ValueError: where an item has an empty prompt or no response.
    """
    sizes = _measure_items(items, tokens_per_row)
    batches = []
    for epoch in range(epochs):
        order = np.arange(len(items))
        if seed is not None:
            order = order_items(len(items), seed=seed, epoch=epoch)
        batches += [order[start : start + batch_size] for start in range(0, len(items), batch_size)]
    # The number of microbatches is the least with which every step fits.
    most = int(max(sizes[batch].sum() for batch in batches))
    microbatches = max(1, -(-most // (num_rows * tokens_per_row)))
    while True:
        steps = [_spread(batch, sizes, microbatches * num_rows) for batch in batches]
        longest = max(sizes[list(row)].sum() for step in steps for row in step if row)
        if longest <= tokens_per_row:
            break
        microbatches += 1
    layout = _fit_layout(items, steps, microbatches, num_rows, row_multiple)
    # Rounding must not lead past what the user said that a device can hold.
    most = max(-(-longest // row_multiple) * row_multiple, tokens_per_row)
    layout = dataclasses.replace(layout, tokens=int(min(layout.tokens, most)))
    planned = len(steps) * microbatches * num_rows * layout.tokens
    return Plan(layout, tuple(steps), float(sum(sizes[batch].sum() for batch in batches) / planned))


def build_batch(
    items: Sequence[Item],
    plan: Plan,
    step: int,
    *,
    reference_logps: Sequence[Sequence[np.ndarray]] | None = None,
) -> Batch:
    """Build the batch of `step` as NumPy arrays with a leading microbatch axis.

    Args:
      reference_logps: for each item, f32[response] for each of its responses.
    """
    layout = plan.layout
    shape = (layout.microbatches * layout.rows,)
    arrays = _empty_arrays(layout, shape[0])
    for row, members in enumerate(plan.steps[step]):
        _fill_row(arrays, row, [items[index] for index in members], layout)
        _fill_logps(arrays, row, [items[index] for index in members], members, reference_logps)
    members = [items[index] for row in plan.steps[step] for index in row]
    split = {
        name: array.reshape(layout.microbatches, layout.rows, *array.shape[1:])
        for name, array in arrays.items()
    }
    view_names = ("indices", "inverse", "owner", "owned", "lengths")
    view = View(**{name: split.pop(name) for name in view_names}, buckets=layout.buckets)
    sequence_names = ("role", "partner", "group", "last", "reward", "weight", "desirable")
    sequences = Sequences(**{name: split.pop(name) for name in sequence_names})
    totals = {
        "num_examples": sum(item.weight for item in members),
        "num_tokens": sum(len(response) for item in members for response in item.responses),
    }
    repeated = {
        name: np.full(layout.microbatches, value, np.float32) for name, value in totals.items()
    }
    return Batch(view=view, sequences=sequences, **split, **repeated)


def split_logps(plan: Plan, step: int, items: Sequence[Item], logps: np.ndarray):
    """Yield (item index, one f32[response] a response) from a step's `f32[m, rows, P]`."""
    flat = logps.reshape(-1, logps.shape[-1])
    for row, members in enumerate(plan.steps[step]):
        start = 0
        for index in members:
            parts = []
            for response in items[index].responses:
                parts.append(np.array(flat[row, start : start + len(response)]))
                start += len(response)
            yield index, tuple(parts)


def split_scores(plan: Plan, step: int, items: Sequence[Item], scores: np.ndarray):
    """Yield (item index, one float a response) from a step's `f32[m, rows, N]`."""
    flat = scores.reshape(-1, scores.shape[-1])
    for row, members in enumerate(plan.steps[step]):
        rows = [items[index] for index in members]
        slots = iter(_assign_sequences(rows, plan.layout))
        for index in members:
            yield index, tuple(float(flat[row, next(slots)]) for _ in items[index].responses)


# --------------------------------------------------------------------------- planning


def _measure_items(items: Sequence[Item], tokens_per_row: int) -> np.ndarray:
    """Return the tokens i64[items] of each item, all of which can be packed."""
    if not items:
        raise ConfigError("data.train: there are no examples to make batches of; add some")
    for number, item in enumerate(items):
        if not len(item.prompt_ids):
            raise ValueError(
                f"item {number} has an empty prompt, so nothing predicts the first token of its "
                "response; give every prompt a token at least (a chat template or a BOS does)"
            )
        if not item.responses:
            raise ValueError(f"item {number} has no response; allowed: one response or more")
    sizes = np.array([item.num_tokens for item in items])
    if sizes.max() > tokens_per_row:
        raise ConfigError(
            f"item {sizes.argmax()} has {sizes.max()} tokens (a prompt and all its responses), but "
            f"a row holds train.tokens_per_device={tokens_per_row}; raise it, or lower "
            "train.max_length"
        )
    return sizes


def _spread(batch: np.ndarray, sizes: np.ndarray, num_rows: int) -> tuple[tuple[int, ...], ...]:
    """Spread items over rows: longest first, each to the emptiest row (Graham's LPT rule)."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = np.zeros(num_rows, np.int64)
    for index in batch[np.argsort(-sizes[batch], kind="stable")]:
        row = int(loads.argmin())
        rows[row].append(int(index))
        loads[row] += sizes[index]
    return tuple(tuple(row) for row in rows)


def _fit_layout(items, steps, microbatches: int, num_rows: int, multiple: int) -> Layout:
    """Return the smallest rounded shapes into which every row of every step fits."""
    rows = [[items[index] for index in row] for step in steps for row in step]
    tokens = max(sum(item.num_tokens for item in row) for row in rows)
    positions = max(sum(len(r) for item in row for r in item.responses) for row in rows)
    lengths = _bucket_lengths(max(_longest(item) for row in rows for item in row), multiple)
    return Layout(
        microbatches=microbatches,
        rows=num_rows,
        tokens=_round_shape(tokens, multiple, parts=8),
        positions=_round_shape(positions, 8, parts=4),
        copies=max(len(item.responses) for row in rows for item in row),
        buckets=_fit_buckets(rows, lengths),
    )


def _fit_buckets(rows, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (sequences, length) buckets that hold every row, out of the longest of `lengths`.

    A bucket is as large as the row that fills it most, so several may hold more in all than one
    would. Each is compiled by itself besides, and more counts are more shapes for another round to
    miss. So the fewest buckets are taken whose attention costs little more than the least.
    """
    choices = []
    for first in reversed(range(len(lengths))):
        kept = lengths[first:]
        counts = np.zeros(len(kept), np.int64)
        for row in rows:
            used = [_bucket_of(length, kept) for length in _sequence_lengths(row)]
            counts = np.maximum(counts, np.bincount(used, minlength=len(kept)))
        buckets = tuple(
            (_round_shape(int(count), 1, parts=2), length)
            for count, length in zip(counts, kept, strict=True)
            if count
        )
        choices.append((sum(count * length**2 for count, length in buckets), buckets))
    least = min(cost for cost, _ in choices)
    return next(buckets for cost, buckets in choices if cost <= 1.25 * least)


def _round_shape(size: int, multiple: int, *, parts: int) -> int:
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
    longest = _round_shape(longest, multiple, parts=8)
    rounded = {-(-max(longest >> shift, 1) // multiple) * multiple for shift in range(3)}
    return sorted(rounded)


def _bucket_of(length: int, lengths: Sequence[int]) -> int:
    return int(np.searchsorted(lengths, length))


def _longest(item: Item) -> int:
    return len(item.prompt_ids) + max(len(response) for response in item.responses)


def _sequence_lengths(row: Sequence[Item]) -> list[int]:
    return [len(item.prompt_ids) + len(response) for item in row for response in item.responses]


def _assign_sequences(row: Sequence[Item], layout: Layout) -> list[int]:
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


# --------------------------------------------------------------------------- filling


def _empty_arrays(layout: Layout, rows: int) -> dict[str, np.ndarray]:
    tokens, slots, sequences = layout.tokens, layout.num_slots, layout.num_sequences

    def full(value, *shape: int, dtype=np.int32) -> np.ndarray:
        return np.full((rows, *shape), value, dtype)

    return {
        "tokens": full(0, tokens),
        "positions": full(0, tokens),
        "indices": full(tokens, slots),
        "inverse": full(slots, layout.copies, tokens),
        "owner": full(slots, tokens),
        "owned": full(tokens, slots),
        "lengths": full(0, sequences),
        "source": full(0, layout.positions),
        "target": full(0, layout.positions),
        "sequence": full(sequences, layout.positions),
        "reference_logps": full(0, layout.positions, dtype=np.float32),
        "old_logps": full(0, layout.positions, dtype=np.float32),
        "role": full(PADDING, sequences),
        "partner": np.tile(np.arange(sequences, dtype=np.int32), (rows, 1)),
        "group": full(-1, sequences),
        "last": full(0, sequences),
        "reward": full(0, sequences, dtype=np.float32),
        "weight": full(0, sequences, dtype=np.float32),
        "desirable": full(False, sequences, dtype=bool),
    }


def _fill_logps(arrays, row: int, items: list[Item], members, reference_logps) -> None:
    """Write what the reference and the sampling policy say of the responses of a row.

    Where nothing is known of the policy that sampled, the reference stands in for it.
    """
    references = [() if reference_logps is None else reference_logps[i] for i in members]
    olds = [item.old_logps or known for item, known in zip(items, references, strict=True)]
    for name, parts in (("reference_logps", references), ("old_logps", olds)):
        start = 0
        for item, logps in zip(items, parts, strict=True):
            length = sum(map(len, item.responses))
            if logps:
                arrays[name][row, start : start + length] = np.concatenate(logps)
            start += length


def _fill_row(arrays: dict[str, np.ndarray], row: int, items: list[Item], layout: Layout) -> None:
    """Write one row: each prompt once, then its responses; then the view of every sequence."""
    at = {name: array[row] for name, array in arrays.items()}
    starts = np.concatenate([np.arange(count) * length for count, length in layout.buckets])
    sizes = [count * length for count, length in layout.buckets]
    starts += np.repeat(np.cumsum([0, *sizes[:-1]]), [count for count, _ in layout.buckets])
    numbers = iter(_assign_sequences(items, layout))
    cursor = written = 0
    for group, item in enumerate(items):
        prompt_length = len(item.prompt_ids)
        prompt = np.arange(cursor, cursor + prompt_length)
        at["tokens"][prompt] = item.prompt_ids
        at["positions"][prompt] = np.arange(prompt_length)
        cursor += prompt_length
        by_role = {}
        for copy, (response, role) in enumerate(zip(item.responses, item.roles, strict=True)):
            length = len(response)
            own = np.arange(cursor, cursor + length)
            at["tokens"][own] = response
            at["positions"][own] = prompt_length + np.arange(length)
            cursor += length

            number = next(numbers)
            by_role[role] = number
            seen = np.concatenate([prompt, own])
            slots = starts[number] + np.arange(len(seen))
            at["indices"][slots] = seen
            at["inverse"][copy if copy else 0, prompt] = slots[:prompt_length]
            at["inverse"][0, own] = slots[prompt_length:]
            # A shared prompt token takes its output from the first sequence; all give the same.
            owned = slots if copy == 0 else slots[prompt_length:]
            tokens = seen if copy == 0 else own
            at["owner"][tokens] = owned
            at["owned"][owned] = tokens

            positions = np.arange(written, written + length)
            at["source"][positions] = seen[prompt_length - 1 : len(seen) - 1]
            at["target"][positions] = response
            at["sequence"][positions] = number
            written += length

            at["lengths"][number] = len(seen)
            at["role"][number] = role
            at["group"][number] = group
            at["last"][number] = seen[-1]
            at["weight"][number] = item.weight
            at["desirable"][number] = item.desirable
            if item.rewards:
                at["reward"][number] = item.rewards[copy]
        if CHOSEN in by_role and REJECTED in by_role:
            at["partner"][by_role[CHOSEN]] = by_role[REJECTED]
            at["partner"][by_role[REJECTED]] = by_role[CHOSEN]
