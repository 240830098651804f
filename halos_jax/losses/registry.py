"""The registry of objectives: name -> pure function, what it needs, and its bound hyperparameters.

A loss is a function `(inputs: LossInputs, batch: Batch, *, hyperparameters) -> LossTerms` decorated
with `@register`. Its keyword arguments are bound against `config.loss` before anything compiles.
"""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from halos_jax.types import Batch


@struct.dataclass
class LossInputs:
    """What the models say about a batch; a loss never sees a model.

    `policy` and `reference` are token log-probabilities f32[rows, P] in nats, 0 at padding;
    `scores` f32[rows, N] are a classifier's logits. What a loss does not need is None.
    """

    policy: jax.Array | None = None
    reference: jax.Array | None = None
    scores: jax.Array | None = None


@struct.dataclass
class LossTerms:
    """Sums over a batch: `value` is divided by the step's examples or tokens, and each metric's
    (sum, count) only when all microbatches have been added up."""

    value: jax.Array  # f32[]
    metrics: dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A registered objective with its hyperparameters bound."""

    name: str
    function: Callable[..., LossTerms]
    needs: Literal["logps", "scores"]
    reference: bool
    per: Literal["example", "token"]
    items: Literal["pair", "target"]

    def __call__(self, inputs: LossInputs, batch: Batch) -> tuple[jax.Array, dict]:
        """Return this batch's share of the step's mean loss, and its metric sums."""
        terms = self.function(inputs, batch)
        total = batch.num_tokens if self.per == "token" else batch.num_examples
        share = terms.value / total
        metrics = {"loss": (share, jnp.ones(())), **terms.metrics}
        return share, metrics


_REGISTRY: dict[str, Loss] = {}


def register(
    name: str,
    *,
    needs: Literal["logps", "scores"] = "logps",
    reference: bool = False,
    per: Literal["example", "token"] = "example",
    items: Literal["pair", "target"] = "pair",
):
    """Register a loss under `name`; a name can be taken once."""

    def add(function: Callable[..., LossTerms]) -> Callable[..., LossTerms]:
        if name in _REGISTRY:
            raise ValueError(f"loss {name!r} is registered already, by {_REGISTRY[name].function}")
        _REGISTRY[name] = Loss(name, function, needs, reference, per, items)
        return function

    return add


def get_loss(settings: Mapping[str, Any]) -> Loss:
    """Return the loss `settings["name"]` with the other settings bound to it.

    Raises:
      ValueError: with the first line of `check_loss`.
    """
    errors = check_loss(settings)
    if errors:
        raise ValueError(errors[0])
    loss = _REGISTRY[settings["name"]]
    arguments = {name: value for name, value in settings.items() if name != "name"}
    return dataclasses.replace(loss, function=functools.partial(loss.function, **arguments))


def check_loss(settings: Mapping[str, Any]) -> list[str]:
    """Return error lines: an unknown loss, an unknown hyperparameter, a value of another type."""
    name = settings.get("name")
    if not isinstance(name, str) or name not in _REGISTRY:
        return [f"loss.name: got {name!r}, allowed: {', '.join(sorted(_REGISTRY))}"]
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(_REGISTRY[name].function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    errors = []
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}" if close else ""
            allowed = ", ".join(known) or "none"
            errors.append(f"loss.{key}: {name!r} has no such parameter{hint}; allowed: {allowed}")
        elif not _fits(value, known[key]):
            errors.append(f"loss.{key}: got {value!r}, allowed: {_describe(known[key])}")
    return errors


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    return type(value) in (int, float) and math.isfinite(value)


def _describe(default: Any) -> str:
    return "True or False" if isinstance(default, bool) else "a finite number"


def list_losses() -> list[str]:
    """Return the names of all registered losses."""
    return sorted(_REGISTRY)
