"""The arrays of packed rows: each prompt once, its responses behind it, and the view of it all."""

import numpy as np

from halos_jax.packing.layout import Layout, assign_sequences
from halos_jax.packing.transforms import NO_SETS, NOTHING
from halos_jax.types import CHOSEN, PADDING, REJECTED, Item


def empty_arrays(layout: Layout, rows: int) -> dict[str, np.ndarray]:
    tokens, entries, sequences = layout.tokens, layout.num_entries, layout.num_sequences

    def full(value: int, *shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.full((rows, *shape), value, dtype)

    arrays = {
        "tokens": full(0, tokens),
        "positions": full(0, tokens),
        "indices": full(tokens, entries),
        "inverse": full(entries, layout.copies, tokens),
        "owner": full(entries, tokens),
        "owned": full(tokens, entries),
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
    if layout.kept != NOTHING:
        arrays["temperature"] = full(1, layout.positions, dtype=np.float32)
    if layout.kept > NO_SETS:
        arrays["kept"] = full(-1, layout.positions, layout.kept)
    return arrays


def fill_row(arrays: dict[str, np.ndarray], row: int, items: list[Item], layout: Layout) -> None:
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
            entries = starts[number] + np.arange(len(seen))
            at["indices"][entries] = seen
            at["inverse"][copy if copy else 0, prompt] = entries[:prompt_length]
            at["inverse"][0, own] = entries[prompt_length:]
            # A shared prompt token takes its output from the first sequence; all give the same.
            owned = entries if copy == 0 else entries[prompt_length:]
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
