"""What is known of the items' targets, the response tokens that are trained on: log-probabilities
and values."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.types import Item

TokenValues = Sequence[Sequence[np.ndarray]]  # for each item, f32[targets] a response


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a policy with a value head said of the items when they were collected.

    `seed` is that of the noise by which the head's inputs are dropped in training.
    """

    logps: TokenValues
    values: TokenValues
    seed: int


def list_token_values(
    items: Sequence[Item],
    members: Sequence[int],
    step: int,
    reference_logps: TokenValues | None,
    old: Collected | None,
    proximal_logps: TokenValues | None = None,
) -> dict[str, np.ndarray]:
    """Return what a row of a batch says of its targets, one array [targets] a field.

    Where nothing is known of the policy that sampled, that which collected the items stands in for
    it, or else the reference.

    Args:
      members: the items of the row, in their order.
      step: number of the batch, for the noise.
    """
    known = reference_logps if old is None else old.logps
    sampled = [_sampled(items[i]) or (known[i] if known else None) for i in members]
    fields = {
        "old_logps": [_fill(items[i], part) for i, part in zip(members, sampled, strict=True)]
    }
    if reference_logps:
        fields["reference_logps"] = [_fill(items[i], reference_logps[i]) for i in members]
    if proximal_logps:
        fields["proximal_logps"] = [_fill(items[i], proximal_logps[i]) for i in members]
    if old:
        fields["old_values"] = [_fill(items[i], old.values[i]) for i in members]
        fields["noise"] = [_draw_noise(items[i], old.seed, step, i) for i in members]
    return {name: np.concatenate(parts) for name, parts in fields.items() if parts}


def refuse_unsampled(items: Sequence[Item]) -> None:
    """Refuse items that do not all say how likely the policy that sampled them found them.

    Raises:
      ConfigError: naming how many there are.
    """
    lacking = sum(not item.old_logps for item in items)
    if lacking:
        raise ConfigError(
            f"loss.correction: got a ratio to the policy that sampled, but {lacking} of "
            f"{len(items)} examples lack its log-probabilities of their answers ('logps' in the "
            "records); allowed: examples that all have them; sample with "
            "--config.sampling.keep_logps=true, or set --config.loss.correction=none"
        )


def _sampled(item: Item) -> Sequence[np.ndarray]:
    """Return the sampling policy's log-probabilities of the item's targets; () if unknown."""
    if not (item.masks and item.old_logps):
        return item.old_logps
    return [logps[mask] for logps, mask in zip(item.old_logps, item.masks, strict=True)]


def _fill(item: Item, parts: Sequence[np.ndarray] | None) -> np.ndarray:
    """Join an item's responses; zeros where nothing is known of them."""
    if parts is None:
        return np.zeros(sum(item.num_targets), np.float32)
    return np.concatenate(parts)


def _draw_noise(item: Item, seed: int, step: int, index: int) -> np.ndarray:
    """Draw a number for each target; it depends on (seed, step, item, target) alone."""
    generator = np.random.default_rng([seed, step, index])
    return generator.integers(2**32, size=sum(item.num_targets), dtype=np.uint32)
