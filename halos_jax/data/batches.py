"""From training items to packed batches: a plan of all steps, then one batch a step.

The plan fixes which items make up each optimizer step, in which row each stands, and one set of
array shapes that fits every step, so that a stage compiles once. A batch holds whole items: the
loss of a step never depends on how its items were packed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.data.layout import Layout, assign_sequences, fit_layout
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
    max_items: int = 0,
) -> Plan:
    """Plan the packing of `epochs` passes over `items`.

    Which items a step holds depends on the seed alone, not on rows or devices.

    Args:
      items: what to train on; must not be empty.
      batch_size: items of an optimizer step; the last step of an epoch may hold fewer.
      num_rows: rows of a microbatch, one a device group.
      tokens_per_row: longest allowed row; a step that needs more becomes several microbatches.
      row_multiple: row and sequence lengths are rounded up to multiples of this.
      seed: order of each epoch; None keeps the items' own order.
      max_items: how many items to take in all, if that is less than `epochs` passes; 0: no bound.

    Raises:
      ConfigError: where `items` is empty or an item is longer than a row.
      ValueError: where an item has an empty prompt or no response.
    """
    sizes = _measure_items(items, tokens_per_row)
    batches = _draw_batches(len(items), batch_size, seed, epochs, max_items)
    # The number of microbatches is the least with which every step fits.
    most = int(max(sizes[batch].sum() for batch in batches))
    microbatches = max(1, -(-most // (num_rows * tokens_per_row)))
    while True:
        steps = [_spread(batch, sizes, microbatches * num_rows) for batch in batches]
        longest = max(sizes[list(row)].sum() for step in steps for row in step if row)
        if longest <= tokens_per_row:
            break
        microbatches += 1
    layout = fit_layout(items, steps, microbatches, num_rows, row_multiple)
    # Rounding must not lead past what the user said that a device can hold.
    most = max(-(-longest // row_multiple) * row_multiple, tokens_per_row)
    layout = dataclasses.replace(layout, tokens=int(min(layout.tokens, most)))
    planned = len(steps) * microbatches * num_rows * layout.tokens
    return Plan(layout, tuple(steps), float(sum(sizes[batch].sum() for batch in batches) / planned))


def count_steps(num_items: int, *, batch_size: int, epochs: int = 1, max_items: int = 0) -> int:
    """Return how many steps `plan_batches` gives `num_items` items."""
    return len(_draw_batches(num_items, batch_size, None, epochs, max_items))


def build_batch(
    items: Sequence[Item],
    plan: Plan,
    step: int,
    *,
    reference_logps: Sequence[Sequence[np.ndarray]] | None = None,
) -> Batch:
    """Build the batch of `step` as NumPy arrays with a leading microbatch axis.

    Args:
      reference_logps: for each item, f32[targets] for each of its responses.
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
        "num_tokens": sum(sum(item.num_targets) for item in members),
    }
    repeated = {
        name: np.full(layout.microbatches, value, np.float32) for name, value in totals.items()
    }
    return Batch(view=view, sequences=sequences, **split, **repeated)


def split_logps(plan: Plan, step: int, items: Sequence[Item], logps: np.ndarray):
    """Yield (item index, one f32[targets] a response) from a step's `f32[m, rows, P]`."""
    flat = logps.reshape(-1, logps.shape[-1])
    for row, members in enumerate(plan.steps[step]):
        start = 0
        for index in members:
            parts = []
            for count in items[index].num_targets:
                parts.append(np.array(flat[row, start : start + count]))
                start += count
            yield index, tuple(parts)


def split_scores(plan: Plan, step: int, items: Sequence[Item], scores: np.ndarray):
    """Yield (item index, one float a response) from a step's `f32[m, rows, N]`."""
    flat = scores.reshape(-1, scores.shape[-1])
    for row, members in enumerate(plan.steps[step]):
        rows = [items[index] for index in members]
        slots = iter(assign_sequences(rows, plan.layout))
        for index in members:
            yield index, tuple(float(flat[row, next(slots)]) for _ in items[index].responses)


# --------------------------------------------------------------------------- planning


def _draw_batches(
    count: int, batch_size: int, seed: int | None, epochs: int, max_items: int
) -> list[np.ndarray]:
    """Return the items i64[at most batch_size] of each step."""
    batches, left = [], max_items or count * epochs
    for epoch in range(epochs):
        order = np.arange(count)
        if seed is not None:
            order = order_items(count, seed=seed, epoch=epoch)
        order = order[:left]
        left -= len(order)
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches


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
    olds = [_old_targets(item) or known for item, known in zip(items, references, strict=True)]
    for name, parts in (("reference_logps", references), ("old_logps", olds)):
        start = 0
        for item, logps in zip(items, parts, strict=True):
            length = sum(item.num_targets)
            if logps:
                arrays[name][row, start : start + length] = np.concatenate(logps)
            start += length


def _old_targets(item: Item) -> Sequence[np.ndarray]:
    """Return the sampling policy's log-probabilities of the item's targets; () if unknown."""
    if not (item.masks and item.old_logps):
        return item.old_logps
    return [logps[mask] for logps, mask in zip(item.old_logps, item.masks, strict=True)]


def _fill_row(arrays: dict[str, np.ndarray], row: int, items: list[Item], layout: Layout) -> None:
    """Write one row: each prompt once, then its responses; then the view of every sequence."""
    at = {name: array[row] for name, array in arrays.items()}
    starts = np.concatenate([np.arange(count) * length for count, length in layout.buckets])
    sizes = [count * length for count, length in layout.buckets]
    starts += np.repeat(np.cumsum([0, *sizes[:-1]]), [count for count, _ in layout.buckets])
    numbers = iter(assign_sequences(items, layout))
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

            targets = np.flatnonzero(item.masks[copy]) if item.masks else np.arange(length)
            positions = np.arange(written, written + len(targets))
            at["source"][positions] = seen[prompt_length - 1 + targets]
            at["target"][positions] = response[targets]
            at["sequence"][positions] = number
            written += len(targets)

            at["lengths"][number] = len(seen)
            at["role"][number] = role
            at["group"][number] = group
            at["last"][number] = seen[-1]
            # A loss may have terms that do not vanish with the tokens: no target, no weight.
            at["weight"][number] = item.weight if len(targets) or not item.masks else 0.0
            at["desirable"][number] = item.desirable
            if item.rewards:
                at["reward"][number] = item.rewards[copy]
        if CHOSEN in by_role and REJECTED in by_role:
            at["partner"][by_role[CHOSEN]] = by_role[REJECTED]
            at["partner"][by_role[REJECTED]] = by_role[CHOSEN]
