"""The registry of objectives: name -> pure function, what it needs, and its bound hyperparameters.

A loss is a function `(inputs: LossInputs, batch: Batch, *, hyperparameters) -> LossTerms` decorated
with `@register`. Its keyword arguments are bound against `config.loss` before anything compiles.
Three settings belong to every loss that reads log-ratios: `humanline` clamps each token's to
[`log_epsilon_P`, `log_epsilon_R`] (Liu, Muennighoff & Ethayarajh 2025), with no gradient where it
is clamped. `correction` weighs stale or foreign data (see the module of that name). "sum" is a
weighted sum of other losses: `{"name": "sum", "dpo": {"weight": 1.0}, ...}`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from halos_jax.config.bounds import describe_setting, fits
from halos_jax.config.kinds import ItemKind
from halos_jax.losses.correction import (
    DEFAULTS,
    LIMITS,
    TRUNCATED,
    Correction,
    Mode,
    correct,
    list_modes,
    refuse,
    refuse_mixture,
)
from halos_jax.losses.sequences import (
    Scalar,
    Sums,
    compute_ratios,
    count_examples,
    take_share,
)
from halos_jax.losses.terms import (
    Divergence,
    LossInputs,
    LossTerms,
    Measure,
    Objective,
    Statistics,
)
from halos_jax.types import Batch

Settings: TypeAlias = Mapping[str, Any]  # `config.loss`, as the user has written it

_HUMANLINE = {"humanline": False, "log_epsilon_P": -1.0, "log_epsilon_R": 1.5}
# Hyperparameter `aggregation` -> what the step's sum is divided by.
_PER: Mapping[str, Literal["example", "token"]] = {
    "token": "token",
    "sequence": "example",
    "constant": "example",
}
_Objective = TypeVar("_Objective", bound=Objective)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A registered objective with its hyperparameters bound."""

    name: str
    function: Objective
    needs: Literal["logps", "scores"]
    reference: bool
    per: Literal["example", "token"]
    items: ItemKind
    old: bool = False
    value: bool = False
    statistics: Measure | None = None
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    clamp: tuple[float, float] | None = None
    penalty: str = ""
    divergence: Divergence | None = None
    corrections: tuple[Mode, ...] = ("none",)
    correction: Correction = Correction()
    parts: tuple["Loss", ...] = ()  # of a sum

    @property
    def sampled(self) -> bool:
        """Whether it reads the log-probabilities under the policy that sampled, whatever is old."""
        return self.correction.is_truncated or any(part.sampled for part in self.parts)

    @property
    def aligned(self) -> bool:
        """Whether it reads `LossInputs.alignment`."""
        return self.correction.mode == "wpo" or any(part.aligned for part in self.parts)

    def __call__(self, inputs: LossInputs, batch: Batch) -> tuple[Scalar, Sums]:
        """Return this batch's share of the step's mean loss, and its metric sums.

        Where the loss has statistics, `inputs.statistics` holds `measure` over the whole step.
        """
        inputs, weighed, found = correct(self.correction, inputs, batch)
        terms = self.function(self._add_ratios(inputs, weighed), weighed)
        share = take_share(terms.value, batch, per=self.per)
        return share, {"loss": (share, jnp.ones(())), **terms.metrics, **found}

    def measure(self, inputs: LossInputs, batch: Batch) -> Statistics:
        """Return what this batch adds to the statistics of its optimizer step, as constants."""
        if self.statistics is None:
            return {}
        return self.statistics(jax.lax.stop_gradient(self._add_ratios(inputs, batch)), batch)

    def _add_ratios(self, inputs: LossInputs, batch: Batch) -> LossInputs:
        if not (self.reference or self.old) or inputs.policy is None:
            return inputs
        other = inputs.old if self.old else inputs.reference
        ratios = compute_ratios(inputs.policy, other, batch)
        low, high = self.clamp or (_HUMANLINE["log_epsilon_P"], _HUMANLINE["log_epsilon_R"])
        return dataclasses.replace(
            inputs,
            ratios=jnp.clip(ratios, low, high) if self.clamp else ratios,
            unclamped=((ratios > low) & (ratios < high)).astype(ratios.dtype),
        )


_REGISTRY: dict[str, Loss] = {}


def register(
    name: str,
    *,
    needs: Literal["logps", "scores"] = "logps",
    reference: bool = False,
    old: bool = False,
    value: bool = False,
    per: Literal["example", "token"] = "example",
    items: ItemKind = "pair",
    statistics: Callable[..., Statistics] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    penalty: str = "",
    divergence: Divergence | None = None,
    corrections: tuple[Mode, ...] | None = None,
) -> Callable[[_Objective], _Objective]:
    """Register a loss under `name`; a name can be taken once.

    Args:
      needs: log-probabilities, or a classifier's scores.
      reference: whether it reads the reference's log-probabilities; `old`: the sampling policy's;
        `value`: the values of a value head.
      per: what the step's sum is divided by, the examples or the response tokens.
      items: what an example is.
      statistics: gives sums that the loss needs over the whole step (see `Loss.measure`), called
        with those of the loss's hyperparameters that it has too.
      limits: hyperparameter -> (least, not above nor equal to) where not every number will do.
      penalty: the hyperparameter that weighs the distance to the reference, if that is all that the
        reference is read for: at 0 it is not.
      divergence: which divergence from a teacher it reads, if it does: its fields are
        hyperparameters of the loss.
      corrections: what its `correction` may be, if not what `list_modes` says.

    A hyperparameter that is a text is annotated with the Literal of those that are allowed. Where
    `aggregation` is "token", the step's sum is divided by its tokens, otherwise by its examples.
    """

    def add(function: _Objective) -> _Objective:
        if name in _REGISTRY or name == "sum":
            taken = _REGISTRY[name].function if name in _REGISTRY else get_loss
            raise ValueError(f"loss {name!r} is registered already, by {taken}")
        _REGISTRY[name] = Loss(
            name,
            function,
            needs,
            reference,
            per,
            items,
            old,
            value,
            statistics,
            limits or {},
            penalty=penalty,
            divergence=divergence,
            corrections=corrections or list_modes(needs, items, old),
        )
        return function

    return add


def get_loss(settings: Settings) -> Loss:
    """Return the loss `settings["name"]` with the other settings bound to it.

    Raises:
      ValueError: with the first line of `check_loss`.
    """
    errors = check_loss(settings)
    if errors:
        raise ValueError(errors[0])
    if settings["name"] == "sum":
        return _make_sum(settings)
    loss = _REGISTRY[settings["name"]]
    arguments = {name: value for name, value in settings.items() if name != "name"}
    on, low, high = (arguments.pop(name, default) for name, default in _HUMANLINE.items())
    mode, cap = (arguments.pop(name, default) for name, default in DEFAULTS.items())
    bound = _list_parameters(loss.name) | arguments
    per = _PER[bound["aggregation"]] if "aggregation" in bound else loss.per
    divergence = loss.divergence
    if divergence is not None:
        own = {name: arguments.pop(name) for name in vars(divergence) if name in arguments}
        divergence = dataclasses.replace(divergence, **own)
    return dataclasses.replace(
        loss,
        reference=loss.reference and bool(bound.get(loss.penalty, True)),
        per=per,
        divergence=divergence,
        function=functools.partial(loss.function, **arguments),
        statistics=_bind_known(loss.statistics, arguments),
        clamp=(low, high) if on else None,
        correction=Correction(mode, float(cap), loss.items, loss.old),
    )


def _bind_known(function: Measure | None, arguments: Mapping[str, Any]) -> Measure | None:
    if function is None:
        return None
    known = inspect.signature(function).parameters
    return functools.partial(
        function, **{name: value for name, value in arguments.items() if name in known}
    )


def _make_sum(settings: Settings) -> Loss:
    """Make the sum of the losses named by the other keys, each times its `weight`."""
    parts = []
    for name, part in settings.items():
        if name != "name":
            rest = {key: value for key, value in part.items() if key != "weight"}
            parts.append((part.get("weight", 1.0), get_loss({"name": name, **rest})))

    def add_up(inputs: LossInputs, batch: Batch) -> LossTerms:
        value, metrics = jnp.zeros(()), Sums()
        for weight, loss in parts:
            share, found = loss(inputs, batch)
            part = share * batch.num_examples
            value += weight * part
            del found["loss"]  # a share of the step's; as a metric it needs a count
            own = {f"loss/{loss.name}": (jax.lax.stop_gradient(part), count_examples(batch))}
            metrics = {**own, **found, **metrics}
        return LossTerms(value, metrics)

    def measure(inputs: LossInputs, batch: Batch) -> Statistics:
        return {k: v for _, loss in parts for k, v in loss.measure(inputs, batch).items()}

    losses = [loss for _, loss in parts]
    return Loss(
        "sum",
        add_up,
        losses[0].needs,
        reference=any(loss.reference for loss in losses),
        per="example",
        items=losses[0].items,
        old=any(loss.old for loss in losses),
        value=any(loss.value for loss in losses),
        statistics=measure if any(loss.statistics for loss in losses) else None,
        divergence=losses[0].divergence,
        parts=tuple(losses),
    )


def check_loss(settings: Settings) -> list[str]:
    """Return error lines: an unknown loss, an unknown hyperparameter, a value that will not do."""
    return _check(settings, "loss")


def _check(settings: Settings, path: str) -> list[str]:
    name = settings.get("name")
    if name == "sum" and path == "loss":
        return _check_sum(settings)
    if not isinstance(name, str) or name not in _REGISTRY:
        return [f"{path}.name: got {name!r}, allowed: {', '.join([*sorted(_REGISTRY), 'sum'])}"]
    known = _list_parameters(name)
    errors = []
    for key, value in settings.items():
        if key == "name":
            continue
        if key in _HUMANLINE and key not in known:
            errors.append(
                f"{path}.{key}: {name!r} has no log-ratio to clamp, since it compares with no "
                "reference (log-probabilities themselves would all be clamped, and train nothing); "
                "leave it out, or take a loss with a reference"
            )
        elif key in DEFAULTS and key not in known:
            if (key, value) != ("correction", "none"):
                errors.append(refuse(name, _REGISTRY[name].corrections, f"{path}.{key}", value))
        elif key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}" if close else ""
            allowed = ", ".join(known) or "none"
            errors.append(f"{path}.{key}: {name!r} has no such parameter{hint}; allowed: {allowed}")
        else:
            limits = {**_REGISTRY[name].limits, **LIMITS}.get(key, (-math.inf, math.inf))
            choices = _list_choices(name, key)
            if key == "correction" and value not in choices:
                errors.append(refuse(name, _REGISTRY[name].corrections, f"{path}.{key}", value))
            elif not (value in choices if choices else fits(value, known[key], limits)):
                allowed = ", ".join(map(repr, choices)) or describe_setting(known[key], limits)
                errors.append(f"{path}.{key}: got {value!r}, allowed: {allowed}")
    errors += [] if errors else _check_idle(settings, path)
    low, high = (settings.get(key, _HUMANLINE[key]) for key in ("log_epsilon_P", "log_epsilon_R"))
    if not errors and not low < high:
        errors.append(f"{path}.log_epsilon_P: got {low}, allowed: less than log_epsilon_R={high}")
    return errors


def _check_idle(settings: Settings, path: str) -> list[str]:
    """Return error lines for hyperparameters that another one leaves without effect."""
    name = settings["name"]
    bound = _list_parameters(name) | dict(settings)
    idle = []
    if "max_tokens" in settings and bound.get("aggregation", "constant") != "constant":
        idle.append(("max_tokens", f"aggregation={bound['aggregation']!r}", "aggregation=constant"))
    if "correction_cap" in settings and bound.get("correction") not in TRUNCATED:
        off = f"correction={bound.get('correction')!r}"
        idle.append(("correction_cap", off, "correction=token_tis"))
    penalty = _REGISTRY[name].penalty
    if settings.get("unbiased_kl") and not bound.get(penalty, True):
        idle.append(("unbiased_kl", f"{penalty}=0", f"{penalty}=0.04"))
    return [
        f"{path}.{key}: got {settings[key]!r}, which has no effect with {off}; leave it out, or "
        f"set --config.{path}.{on}"
        for key, off, on in idle
    ]


def _check_sum(settings: Settings) -> list[str]:
    parts = {name: part for name, part in settings.items() if name != "name"}
    errors = [] if parts else ["loss: 'sum' got no losses to add; set loss.dpo.weight=1, say"]
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            errors.append(f"loss.{name}: got {part!r}, allowed: a section: weight, and parameters")
            continue
        if not fits(part.get("weight", 1.0), 1.0):
            errors.append(f"loss.{name}.weight: got {part['weight']!r}, allowed: a finite number")
        rest = {key: value for key, value in part.items() if key != "weight"}
        errors += _check({"name": name} | rest, f"loss.{name}")
    if errors:
        return errors
    able = {name: part for name, part in parts.items() if len(_REGISTRY[name].corrections) > 1}
    errors += refuse_mixture(able)
    if errors:
        return errors
    # One batch serves all parts, so they must agree on what stands in it.
    kinds = {(_REGISTRY[name].items, _REGISTRY[name].needs) for name in parts}
    if len(kinds) > 1:
        listed = ", ".join(f"{name} {_REGISTRY[name].items}" for name in parts)
        return [f"loss: 'sum' got losses of different examples ({listed}), allowed: of one kind"]
    return []


def _list_parameters(name: str) -> dict[str, Any]:
    """Return the settings that a loss takes, with their defaults."""
    loss = _REGISTRY[name]
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(loss.function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    known |= {} if loss.divergence is None else vars(loss.divergence)
    known |= _HUMANLINE if loss.reference or loss.old else {}
    return {**known, **(DEFAULTS if len(loss.corrections) > 1 else {})}


def fill_defaults(settings: Settings) -> dict[str, Any]:
    """Return the settings of one loss with the defaults of those left out; others as they are."""
    name = settings.get("name")
    known = _list_parameters(name) if isinstance(name, str) and name in _REGISTRY else {}
    return {**known, **settings}


def _list_choices(name: str, key: str) -> tuple[Any, ...]:
    """Return the values of a hyperparameter that is annotated with a Literal; () of another."""
    if key == "correction":
        return _REGISTRY[name].corrections
    parameter = inspect.signature(_REGISTRY[name].function).parameters.get(key)
    if parameter is None or typing.get_origin(parameter.annotation) is not Literal:
        return ()
    return typing.get_args(parameter.annotation)


def list_losses() -> list[str]:
    """Return the names of all registered losses."""
    return sorted(_REGISTRY)
