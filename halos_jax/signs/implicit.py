"""The scale of a loss's implicit reward: what a log-ratio is multiplied by."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from halos_jax.losses import get_loss

# Losses whose implicit reward is the scale times the mean log-ratio by token, not its sum.
_BY_TOKEN = ("dpo_norm", "ipo")
_NAMES = {"ipo": "tau"}  # hyperparameter that is the scale, where it is not "beta"
_USUAL = 0.1  # DPO's


class Scale(NamedTuple):
    """What makes an implicit reward of a log-ratio, in nats a sequence or, `by_token`, a token."""

    beta: float
    by_token: bool = False

    def weigh(self, ratio: float, length: int) -> float:
        """Return the implicit reward of a response of `length` tokens."""
        return self.beta * (ratio / length if self.by_token else ratio)


def find_scale(settings: Mapping[str, Any]) -> Scale:
    """Return the scale that the loss has: its beta, or DPO's 0.1 if it compares with no reference
    or has none. Of a sum of losses, it is that of the first one with a reference.

    Args:
      settings: `config.loss`.
    """
    if settings["name"] == "sum":
        parts = [{**part, "name": name} for name, part in settings.items() if name != "name"]
        plain = [{key: one for key, one in part.items() if key != "weight"} for part in parts]
        found = [part for part in plain if get_loss(part).reference]
        return find_scale(found[0]) if found else Scale(_USUAL)
    loss = get_loss(settings)
    parameters = inspect.signature(loss.function).parameters
    scale = parameters.get(_NAMES.get(loss.name, "beta"))
    if not loss.reference or scale is None:
        return Scale(_USUAL, loss.name in _BY_TOKEN)
    return Scale(float(scale.default), loss.name in _BY_TOKEN)
