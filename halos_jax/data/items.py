"""From a source of records to the items of an objective, whatever it trains on."""

import logging
from collections.abc import Sequence

from halos_jax.data import datasets
from halos_jax.data.chat import Renderer
from halos_jax.data.tokenize import (
    Lengths,
    make_controlled_items,
    make_pair_items,
    make_scored_items,
    make_target_items,
    make_unpaired_items,
)
from halos_jax.losses.registry import Items
from halos_jax.losses.unpaired import suggest_weights
from halos_jax.types import Item

logger = logging.getLogger(__name__)


def load_items(
    kind: Items,
    source: str,
    renderer: Renderer,
    lengths: Lengths,
    *,
    limit: int = 0,
    control: tuple[str, str] = ("", ""),
) -> list[Item]:
    """Load the records of `source` as items of one kind (`Loss.items`).

    Args:
      source: a file or a hub data set, see `datasets`.
      limit: how many records to load; 0 loads all.
      control: of "controlled", what begins desirable answers and others.

    Raises:
      RecordError: for a bad record, or one that does not suit the kind.
      ConfigError: where a prompt leaves no room for a response.
    """
    if kind == "target":
        conversations = datasets.load_conversations(source, limit=limit)
        return make_target_items(conversations, renderer, lengths)
    if kind == "pair":
        preferences = datasets.load_preferences(source, limit=limit)
        return make_pair_items(preferences, renderer, lengths)
    if kind == "group":
        return make_scored_items(datasets.load_scored(source, limit=limit), renderer, lengths)
    judgements = datasets.load_judgements(source, limit=limit)
    if kind == "controlled":
        return make_controlled_items(judgements, renderer, lengths, control)
    items = make_unpaired_items(judgements, renderer, lengths)
    _report_balance(items)
    return items


def _report_balance(items: Sequence[Item]) -> None:
    """Log how many answers are of each class, and which weights would balance them."""
    desirable = sum(item.desirable for item in items)
    low, high = suggest_weights(desirable, len(items) - desirable)
    logger.info(
        "%d desirable and %d undesirable answers; for KTO, loss.desirable_weight of %.2f to %.2f "
        "times loss.undesirable_weight balances them",
        desirable,
        len(items) - desirable,
        low,
        high,
    )
