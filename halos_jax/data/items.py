"""From a source of records to the items of an objective, whatever it trains on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.data import datasets
from halos_jax.data.chat import Renderer
from halos_jax.data.conversations import make_target_items
from halos_jax.data.datasets import ALL, Selection
from halos_jax.data.tokenize import (
    Lengths,
    make_answer_items,
    make_controlled_items,
    make_pair_items,
    make_scored_items,
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
    selection: Selection = ALL,
    *,
    control: tuple[str, str] = ("", ""),
) -> list[Item]:
    """Load the records of `source` as items of one kind (`Loss.items`).

    Args:
      source: files or hub data sets, see `sources.read_sources`.
      selection: what of it to take.
      control: of "controlled", what begins desirable answers and others.

    Raises:
      RecordError: for a bad record, or one that does not suit the kind.
      ConfigError: where a prompt leaves no room for a response.
    """
    if kind == "target":
        found = datasets.load_demonstrations(source, selection)
        return make_target_items(found, renderer, lengths)
    if kind == "pair":
        return make_pair_items(datasets.load_preferences(source, selection), renderer, lengths)
    if kind == "group" or (kind == "answer" and datasets.has_scores(source)):
        return make_scored_items(datasets.load_scored(source, selection), renderer, lengths)
    judgements = datasets.load_judgements(source, selection)
    if kind == "controlled":
        return make_controlled_items(judgements, renderer, lengths, control)
    if kind == "answer":
        return make_answer_items(judgements, renderer, lengths)
    return make_unpaired_items(judgements, renderer, lengths)


def report_balance(items: Sequence[Item], settings: Mapping[str, Any]) -> None:
    """Log how many answers are of each class, and better weights where KTO's do not balance them.

    Balanced is `w_D n_D / (w_U n_U)` within [1, 4/3] (Ethayarajh et al. 2024, equation 9).

    Args:
      items: of the kind "unpaired".
      settings: `config.loss`.
    """
    desirable = sum(item.desirable for item in items)
    undesirable = len(items) - desirable
    logger.info("%d desirable and %d undesirable answers", desirable, undesirable)
    kto = settings if settings.get("name") == "kto" else settings.get("kto")
    if kto is None or not (desirable and undesirable):
        return
    weights = [float(kto.get(f"{name}_weight", 1.0)) for name in ("desirable", "undesirable")]
    if min(weights) <= 0:  # one class is switched off on purpose
        return
    low, high = suggest_weights(desirable, undesirable)
    # Counts make fractions: a weight on the very limit may miss it in the last bit.
    if low * (1 - 1e-4) <= weights[0] / weights[1] <= high * (1 + 1e-4):
        return
    middle = 1.0 if low <= 1 <= high else (low * high) ** 0.5
    logger.warning(
        "desirable to undesirable answers weigh %.3g : 1 (number x weight), outside of 1 to 4/3; "
        "to balance them: loss.desirable_weight=%.3g loss.undesirable_weight=%.3g",
        weights[0] * desirable / (weights[1] * undesirable),
        max(middle, 1.0),
        max(1 / middle, 1.0),
    )
