"""The balance between the two classes of binary feedback."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.losses.unpaired import suggest_weights
from halos_jax.types import Item

logger = logging.getLogger(__name__)


def report_balance(items: Sequence[Item], settings: Mapping[str, Any]) -> None:
    """Log how many answers each class has, and better weights if KTO's do not balance them.

    The classes are balanced if `w_D n_D / (w_U n_U)` is in [1, 4/3] (Ethayarajh et al. 2024,
    equation 9).

    Args:
      items: items of the kind "unpaired".
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
    # With a tolerance: rounding may put a weight that lies on a limit just outside.
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
