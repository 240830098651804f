"""What the targets of a row were drawn from: temperatures, and the tokens that were kept."""

from collections.abc import Sequence

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.types import Item

# Of `Layout.kept`: the tokens were drawn from the policy itself, or from all tokens that there are.
NOTHING, NO_SETS = -1, 0
_FEWEST = 8


def measure_kept(items: Sequence[Item]) -> int:
    """Return the width of a table that holds the sets of kept tokens of all items.

    It is a power of two, so that data of another round often has the same; NO_SETS where the
    temperature alone is to be known, NOTHING where no item says what it was drawn from.

    Raises:
      ConfigError: if only a part of the items says so, or only a part has sets.
    """
    drawn = [one for item in items for one in item.drawn]
    if not drawn:
        return NOTHING
    without = sum(not item.drawn for item in items)
    if without:
        raise ConfigError(
            f"data.train: {without} of {len(items)} examples do not say what their tokens were "
            "drawn from ('drawn' in the records), and the others do; allowed: all or none, since "
            "one step would compare probabilities of two kinds; sample all of them with the same "
            "sampling.exact_ratios, or leave the field out by data.ignore_fields=drawn"
        )
    counts = [one.kept_counts for one in drawn if one.logps]
    bare = sum(not one for one in counts)
    if bare == len(counts):
        return NO_SETS
    if bare:
        raise ConfigError(
            f"data.train: {bare} of {len(counts)} responses were drawn from all tokens ('drawn' in "
            "the records has no kept_ids), and the others were not; allowed: all or none; sample "
            "all of them with the same sampling.top_p and sampling.top_k"
        )
    most = max(map(max, counts))
    return max(1 << (most - 1).bit_length(), _FEWEST)


def list_transforms(items: Sequence[Item], width: int) -> dict[str, np.ndarray]:
    """Return what a row's targets were drawn from, one array [targets, ...] a field.

    Args:
      width: of `measure_kept`.
    """
    heats, tables = [], []
    for item in items:
        for number, one in enumerate(item.drawn):
            mask = item.masks[number] if item.masks else np.ones(len(one.logps), bool)
            heats.append(np.full(mask.sum(), one.temperature, np.float32))
            if width:
                tables.append(one.tabulate(width)[mask])
    fields = {"temperature": heats} | ({"kept": tables} if width else {})
    return {name: np.concatenate(parts) for name, parts in fields.items() if parts}
