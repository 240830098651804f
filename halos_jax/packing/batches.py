"""From training items to packed batches: a plan of all steps, then one batch a step.

The plan fixes which items make up each optimizer step, in which row each stands, and one set of
array shapes that fits every step, so that a stage compiles once. A batch holds whole items: the
loss of a step never depends on how its items were packed.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.integers import divide_up, round_up
from halos_jax.packing.layout import Layout, assign_sequences, fit_layout, reuse_layout
from halos_jax.packing.rows import empty_arrays, fill_row
from halos_jax.packing.token_values import Collected, TokenValues, list_token_values
from halos_jax.packing.transforms import NOTHING, list_transforms
from halos_jax.types import Batch, Item, Sequences, Transform, View

_STRETCH = 16  # steps among which items are exchanged
_EQUAL = 1.02  # largest step over the mean that is left alone
_ALIKE = 1.25  # ratio of lengths within which items are exchanged in any order


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
    cuts: Sequence[int] = (),
    known: Sequence[Layout] | None = None,
) -> Plan:
    """Plan the packing of `epochs` passes over `items`.

    Which items a step holds depends on the seed and their lengths alone, not on rows or devices.

    Args:
      items: what to train on; must not be empty.
      batch_size: items of an optimizer step, as nearly as `split_evenly` allows.
      num_rows: rows of a microbatch, one a device group.
      tokens_per_row: longest allowed row; a step that needs more becomes several microbatches.
      row_multiple: row and sequence lengths are rounded up to multiples of this.
      seed: order of each epoch; None keeps the items' own order. With a seed, the steps of a
        stretch exchange items until they hold about as many tokens: all have the same shapes, so
        what the largest needs, the others waste.
      max_items: how many items to take in all, if that is less than `epochs` passes; 0: no bound.
      cuts: items after which an earlier plan has ended: its steps stay as they are, and others
        follow.
      known: layouts that programs are compiled for; the first that will do is taken, or grown
        where that costs little. None: no such plan was made before, nor will one be after this.

    Raises:
      ConfigError: if `items` is empty or an item is longer than a row.
      ValueError: if an item has an empty prompt or no response.
    """
    sizes = _measure_items(items, tokens_per_row)
    batches = _draw_batches(len(items), batch_size, seed, epochs, max_items, sizes, cuts)
    # The number of microbatches is the least with which every step fits.
    most = int(max(sizes[batch].sum() for batch in batches))
    microbatches = max(1, divide_up(most, num_rows * tokens_per_row))
    while True:
        steps = [_spread(batch, sizes, microbatches * num_rows) for batch in batches]
        longest = max(sizes[list(row)].sum() for step in steps for row in step if row)
        if longest <= tokens_per_row:
            break
        microbatches += 1
    layout = fit_layout(
        items, steps, microbatches, num_rows, row_multiple, recurring=known is not None
    )
    # Rounding must not lead past what the user said that a device can hold.
    most = max(round_up(longest, row_multiple), tokens_per_row)
    layout = dataclasses.replace(layout, tokens=int(min(layout.tokens, most)))
    # A run that is carried on with shorter rows has known longer ones.
    limit = round_up(tokens_per_row, row_multiple)
    usable = (one for one in known or () if one.tokens <= limit)
    found = (reuse_layout(items, steps, needed=layout, known=one) for one in usable)
    layout = next((one for one in found if one is not layout), layout)
    planned = len(steps) * microbatches * num_rows * layout.tokens
    return Plan(layout, tuple(steps), float(sum(sizes[batch].sum() for batch in batches) / planned))


def count_steps(
    num_items: int,
    *,
    batch_size: int,
    epochs: int = 1,
    max_items: int = 0,
    cuts: Sequence[int] = (),
) -> int:
    """Return how many steps `plan_batches` gives `num_items` items."""
    return len(_draw_batches(num_items, batch_size, None, epochs, max_items, cuts=cuts))


def split_evenly(count: int, batch_size: int) -> list[int]:
    """Return the sizes of the steps in which `count` items are taken, the larger ones first.

    There are `max(1, round(count / batch_size))` steps (halves round up), whose sizes differ by at
    most one: every step moves the policy at the same learning rate, so a last step of the few items
    that are left over would weigh each of them many times as much as the others.
    """
    steps = max(1, math.floor(count / batch_size + 0.5))
    size, larger = divmod(count, steps)
    return [size + 1] * larger + [size] * (steps - larger)


def build_batch(
    items: Sequence[Item],
    plan: Plan,
    step: int,
    *,
    reference_logps: TokenValues | None = None,
    old: Collected | None = None,
    proximal_logps: TokenValues | None = None,
    progress: float | None = None,
) -> Batch:
    """Build the batch of `step` as NumPy arrays with a leading microbatch axis.

    Args:
      reference_logps: for each item, f32[targets] for each of its responses.
      old: what the policy and its value head said when the items were collected.
      proximal_logps: as the reference's, of the policy that stands in for that which sampled.
      progress: the share of the run's prompts that are used before the step.
    """
    layout = plan.layout
    shape = (layout.microbatches * layout.rows,)
    arrays = empty_arrays(layout, shape[0])
    if old is not None:
        for name, dtype in (("old_values", np.float32), ("noise", np.uint32)):
            arrays[name] = np.zeros((*shape, layout.positions), dtype)
    if proximal_logps is not None:
        arrays["proximal_logps"] = np.zeros((*shape, layout.positions), np.float32)
    for row, members in enumerate(plan.steps[step]):
        own = [items[index] for index in members]
        fill_row(arrays, row, own, layout)
        known = list_token_values(items, members, step, reference_logps, old, proximal_logps)
        if layout.kept != NOTHING:
            known |= list_transforms(own, layout.kept)
        for name, parts in known.items():
            arrays[name][row, : len(parts)] = parts
    taken = [items[index] for row in plan.steps[step] for index in row]
    split: dict[str, Any] = {  # NumPy's, on their way to a device
        name: array.reshape(layout.microbatches, layout.rows, *array.shape[1:])
        for name, array in arrays.items()
    }
    view_names = ("indices", "inverse", "owner", "owned", "lengths")
    view = View(**{name: split.pop(name) for name in view_names}, buckets=layout.buckets)
    sequence_names = ("role", "partner", "group", "last", "reward", "weight", "desirable")
    sequences = Sequences(**{name: split.pop(name) for name in sequence_names})
    heat, kept = split.pop("temperature", None), split.pop("kept", None)
    transform = None if heat is None else Transform(heat, kept)
    totals: dict[str, float] = {} if progress is None else {"progress": progress}
    totals |= {
        "num_examples": sum(item.weight for item in taken),
        "num_tokens": sum(sum(item.num_targets) for item in taken),
    }
    split |= {
        name: np.full(layout.microbatches, value, np.float32) for name, value in totals.items()
    }
    return Batch(view=view, sequences=sequences, transform=transform, **split)


def split_logps(
    plan: Plan, step: int, items: Sequence[Item], logps: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
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


def split_scores(
    plan: Plan, step: int, items: Sequence[Item], scores: np.ndarray
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield (item index, one float a response) from a step's `f32[m, rows, sequences]`."""
    flat = scores.reshape(-1, scores.shape[-1])
    for row, members in enumerate(plan.steps[step]):
        rows = [items[index] for index in members]
        numbers = iter(assign_sequences(rows, plan.layout))
        for index in members:
            yield index, tuple(float(flat[row, next(numbers)]) for _ in items[index].responses)


# --------------------------------------------------------------------------- planning


def _draw_batches(
    count: int,
    batch_size: int,
    seed: int | None,
    epochs: int,
    max_items: int,
    sizes: np.ndarray | None = None,
    cuts: Sequence[int] = (),
) -> list[np.ndarray]:
    """Return the items i64[about batch_size] of each step."""
    batches, taken, left = [], 0, max_items or count * epochs
    for epoch in range(epochs):
        order = np.arange(count)
        if seed is not None:
            order = order_items(count, seed=seed, epoch=epoch)
        order = order[:left]
        left -= len(order)
        if not len(order):
            break
        inside = sorted(cut - taken for cut in set(cuts) if 0 < cut - taken < len(order))
        taken += len(order)
        for part in np.split(order, inside):
            steps = np.split(part, np.cumsum(split_evenly(len(part), batch_size))[:-1])
            if seed is not None and sizes is not None:
                steps = _balance(steps, sizes)
            batches += steps
    return batches


def _balance(steps: list[np.ndarray], sizes: np.ndarray) -> list[np.ndarray]:
    """Return `steps` with items exchanged within stretches of steps of unequal sizes.

    The longest first, each item of a stretch goes to the step with the least so far (Graham's LPT
    rule, among the steps that are not full). Items of about one length are taken in the order that
    they come in, so that who shares a step is another matter in every epoch.
    """
    balanced: list[np.ndarray] = []
    for start in range(0, len(steps), _STRETCH):
        stretch = steps[start : start + _STRETCH]
        sums = np.array([sizes[step].sum() for step in stretch])
        if sums.max() <= _EQUAL * sums.mean():
            balanced += stretch
            continue
        filled: list[list[int]] = [[] for _ in stretch]
        loads = [(0, step) for step in range(len(stretch))]  # equal loads: a heap
        part = np.concatenate(stretch)
        alike = np.floor(np.log(sizes[part]) / np.log(_ALIKE))
        for index in part[np.argsort(-alike, kind="stable")]:
            load, step = heapq.heappop(loads)
            filled[step].append(int(index))
            if len(filled[step]) < len(stretch[step]):
                heapq.heappush(loads, (load + int(sizes[index]), step))
        balanced += [np.array(step) for step in filled]
    return balanced


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
