"""Rewards by a Python function, called once per response, or once per batch as in TRL."""

import dataclasses
import decimal
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.config.rewards import RewardConfig
from halos_jax.data.records.fields import shorten
from halos_jax.data.records.turns import turns_to_record
from halos_jax.data.records.unread import Skips
from halos_jax.rewards import functions
from halos_jax.rewards.functions import ReferenceAnswerError
from halos_jax.rewards.labels import RewardError, Scorer
from halos_jax.rewards.parts import part_to_reward
from halos_jax.types import Prompt, Sample
from halos_jax.user_code import explain_errors, import_function

_NO_REWARD = "return None for 'no reward'"
_ALLOWED = "a finite number of at most 3.4e38 (float32), or None where there is no reward"
_CALLS = (
    "it is called as f(prompt turns, response text), with record=... where it has that parameter; "
    "or, where it has a parameter 'completions', once a batch as in TRL: "
    "f(prompts=[...], completions=[...], FIELD=[...] of the records)"
)
_ANSWERS = "reference answers"
_LARGEST = float(np.finfo(np.float32).max)
# Lists in a batch besides the fields of the records.
_BATCH = ("prompts", "completions", "completion_ids")
_FILLED_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of the user with its settings; `field` is the config's field that names it."""

    call: Callable[..., Any]
    name: str
    field: str
    arguments: Mapping[str, Any]
    form: str  # form of a batch's completions: "text" or "turns"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.call).parameters

    @property
    def is_batched(self) -> bool:
        """Whether it has TRL's signature."""
        return "completions" in self.parameters

    @property
    def takes_any(self) -> bool:
        return any(one.kind is one.VAR_KEYWORD for one in self.parameters.values())

    def __str__(self) -> str:
        return f"{self.field} {self.name!r}"


def make_function_scorer(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    form: str = "auto",
    field: str = "reward.function",
    check: Callable[[], None] = lambda: None,
) -> Scorer:
    """Return a scorer that calls `package.module:function`.

    It is called with each prompt, a list of {"role", "content"} dicts, and response, a text. If it
    has a parameter `record`, it also gets the other fields of the prompt's record. It returns a
    finite number, or None for no reward.

    A function with a parameter `completions` is called as TRL calls it: once for all samples, by
    keyword. Of `prompts`, `completions`, `completion_ids` and the fields of the records it gets
    those that it takes, each as a list with one element per sample (None if a record lacks the
    field). It returns a list with a number or None for each sample.

    Args:
      arguments: passed to every call by name.
      form: the form of `completions` and `prompts`: "text"; "turns", lists of turns; "auto", the
        one in the annotation of `completions` (`list[str]` or `list[list[dict]]`), else "text".
      field: the config's field that names the function.
      check: called before each call; an error that it raises stops the scorer.

    Raises:
      ConfigError: if the function cannot be imported or does not take the arguments.
    """
    function = _load(name, dict(arguments or {}), form, field)
    if function.is_batched:
        return lambda samples: _score_batch(function, samples, check)
    return lambda samples: _score_each(function, samples, check)


def make_rules(reward: RewardConfig) -> dict[str, Scorer]:
    """Return the scorers of `reward.rules`, by the names of their functions."""
    return {
        name.rpartition(":")[2]: make_function_scorer(
            name, form=reward.completions, field="reward.rules"
        )
        for name in reward.rules
    }


def check_records(
    reward: RewardConfig, prompts: Iterable[Prompt], *, skip: bool = False
) -> list[Prompt]:
    """Return the prompts whose records have the fields that reward functions and rules need.

    The functions of `rewards.functions` need a reference answer; they are tried on an empty
    response, since they are cheap and have no side effects. A function with TRL's signature needs
    every field that is a parameter without a default. So missing fields are found before a round is
    sampled.

    Args:
      skip: leave out records without a reference answer, and log their number.

    Raises:
      RewardError: for the first record without a reference answer, unless they are left out; if
        none remains; and if no record has a field that a function needs.
    """
    prompts = list(prompts)
    singles = [part_to_reward(part, reward) for part in reward.parts.values()] or [reward]
    loaded = [
        _load(one.function, one.arguments, one.completions, "reward.function")
        for one in singles
        if REWARD_KINDS[one.kind].function
    ]
    loaded += [_load(name, {}, reward.completions, "reward.rules") for name in reward.rules]
    skips, kept = Skips(allowed=skip), prompts
    for function in loaded:
        if function.is_batched:
            _check_columns(function, {name for prompt in prompts for name in prompt.extra})
        elif function.name.startswith(f"{functions.__name__}:"):
            kept = _try_references(function, kept, skips)
    skips.require(_ANSWERS, len(kept))
    skips.report(_ANSWERS, len(kept), "left")
    return kept


def _try_references(function: _Function, prompts: list[Prompt], skips: Skips) -> list[Prompt]:
    """Return the prompts with a reference answer; `skips` gets the errors of the others."""
    if "record" not in function.parameters:
        return prompts
    kept = []
    for prompt in prompts:
        try:
            function.call([], "", record=dict(prompt.extra), **function.arguments)
        except ReferenceAnswerError as error:
            place = f"{prompt.place}: " if prompt.place else ""
            shown = f"prompt {prompt.prompt_id} ({prompt.turns[-1].content[:60]!r})"
            skips.add(RewardError(f"{place}{function}: {shown}: {error}"))
        else:
            kept.append(prompt)
    return kept


def read_number(value: object) -> float | None:
    """Return a reward as a float; None if it is not a real number that fits in float32.

    Booleans count as numbers, as do scalars and zero-dimensional arrays of NumPy, JAX and PyTorch.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if abs(number) <= _LARGEST else None


# --------------------------------------------------------------------------- once per response


def _score_each(
    function: _Function, samples: Sequence[Sample], check: Callable[[], None]
) -> list[float | None]:
    wants_record = "record" in function.parameters
    rewards = []
    for sample in samples:
        check()
        turns = turns_to_record(sample.prompt.turns)
        extra = {"record": dict(sample.prompt.extra)} if wants_record else {}
        where = f"prompt {sample.prompt.prompt_id}, sample {sample.sample_id}"
        advice = _advise(extra.get("record"))
        with explain_errors(str(function), where, advice=advice, error=RewardError):
            try:
                reward = function.call(turns, sample.output, **extra, **function.arguments)
            except ReferenceAnswerError as error:
                raise RewardError(f"{function}: {where}: {error}") from error
        rewards.append(_read_reward(function, reward, where))
    return rewards


def _advise(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return _NO_REWARD
    return f"{_NO_REWARD}; the record has {', '.join(sorted(record)) or 'no other fields'}"


def _read_reward(function: _Function, reward: object, where: str) -> float | None:
    if reward is None:
        return None
    number = read_number(reward)
    if number is None:
        hint = ""
        if isinstance(reward, (list, tuple)) or getattr(reward, "ndim", 0) > 0:
            hint = f"; {_CALLS}"
        elif inspect.isawaitable(reward):
            hint = "; an async function is not waited for"
        raise RewardError(f"{function}: got {_show(reward)} for {where}; allowed: {_ALLOWED}{hint}")
    return number


def _show(value: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(value, (list, tuple)):
        kind = "numbers" if all(read_number(one) is not None for one in value) else "values"
        return f"a {type(value).__name__} of {len(value)} {kind}"
    if getattr(value, "shape", None):
        return f"an array of shape {tuple(value.shape)}"
    return shorten(value)


# --------------------------------------------------------------------------- once per batch


def _score_batch(
    function: _Function, samples: Sequence[Sample], check: Callable[[], None]
) -> list[float | None]:
    if not samples:
        return []
    check()
    columns = list(dict.fromkeys(name for sample in samples for name in sample.prompt.extra))
    _check_columns(function, columns)
    lists = {
        "prompts": [_show_prompt(sample.prompt, function.form) for sample in samples],
        "completions": [_show_output(sample.output, function.form) for sample in samples],
        "completion_ids": [list(sample.response_ids) for sample in samples],
    }
    lists |= {name: [sample.prompt.extra.get(name) for sample in samples] for name in columns}
    given = {
        name: values
        for name, values in lists.items()
        if function.takes_any or name in function.parameters
    }
    where = f"a batch of {len(samples)} completions"
    forms = f"its completions are {function.form} (reward.completions=text or turns)"
    with explain_errors(str(function), where, advice=f"{_NO_REWARD}; {forms}", error=RewardError):
        rewards = function.call(**given, **function.arguments)
        # A one-dimensional array becomes a list.
        listed = list(rewards) if getattr(rewards, "ndim", 0) == 1 else rewards
    if not isinstance(listed, (list, tuple)) or len(listed) != len(samples):
        raise RewardError(
            f"{function}: got {_show(rewards)} for {where}; allowed: a list of as many numbers, or "
            "None where there is no reward"
        )
    places = [f"prompt {one.prompt.prompt_id}, sample {one.sample_id}" for one in samples]
    return [_read_reward(function, *pair) for pair in zip(listed, places, strict=True)]


def _show_prompt(prompt: Prompt, form: str) -> Any:
    if form == "turns":
        return turns_to_record(prompt.turns)
    return "\n\n".join(turn.content for turn in prompt.turns)


def _show_output(output: str, form: str) -> Any:
    return [{"role": "assistant", "content": output}] if form == "turns" else output


def _check_columns(function: _Function, columns: Iterable[str]) -> None:
    """Raise RewardError if no record has a field that the function needs."""
    columns = set(columns)
    known = {*_BATCH, *function.arguments, *columns}
    missing = [name for name in _list_required(function) if name not in known]
    if missing:
        raise RewardError(
            f"{function}: its parameters {', '.join(missing)} need fields of the records, which "
            f"have {', '.join(sorted(columns)) or 'no further ones'}; name one of these, or give "
            "them a default, or a value by reward.arguments"
        )
    taken = sorted(columns & {*_BATCH, *function.arguments})
    if taken:
        raise RewardError(
            f"{function}: the records have the fields {', '.join(taken)}, and so has the call; "
            "allowed: other names in the records"
        )


def _list_required(function: _Function) -> list[str]:
    return [
        name
        for name, one in function.parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]


# --------------------------------------------------------------------------- set-up


def _load(name: str, arguments: Mapping[str, Any], form: str, field: str) -> _Function:
    """Import a function and check that it can be called with the arguments."""
    call = import_function(name, field)
    parameters = inspect.signature(call).parameters
    if form == "auto":
        form = _read_form(parameters["completions"]) if "completions" in parameters else "text"
    function = _Function(call, name, field, arguments, form)
    if function.is_batched:
        _check_batched(function)
    else:
        _check_single(function)
    check: Callable[..., list[str]] | None = getattr(call, functions.CHECK, None)
    lines = check(**arguments) if check is not None else []
    if lines:
        raise ConfigError("\n".join(f"reward.arguments.{line}" for line in lines))
    return function


def _read_form(parameter: inspect.Parameter) -> str:
    """Return the form of completions from an annotation: "turns" if it has dicts, else "text"."""
    annotation = str(parameter.annotation).lower()
    return "turns" if "dict" in annotation or "mapping" in annotation else "text"


def _check_single(function: _Function) -> None:
    extra: dict[str, Any] = {"record": {}} if "record" in function.parameters else {}
    signature = inspect.signature(function.call)
    try:
        signature.bind([], "", **extra)
    except TypeError as error:
        if not function.arguments:
            raise ConfigError(
                f"{function.field}: got {function.name!r}, whose parameters are {signature} "
                f"({error}); allowed: {_CALLS}"
            ) from error
    try:
        signature.bind([], "", **extra, **function.arguments)
    except TypeError as error:
        raise ConfigError(
            f"reward.arguments: got {dict(function.arguments)}, which {function.name!r} does not "
            f"take ({error}); allowed: the parameters of {signature} after the response"
        ) from error


def _check_batched(function: _Function) -> None:
    by_place = [
        name
        for name, one in function.parameters.items()
        if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)
    ]
    if by_place:
        raise ConfigError(
            f"{function.field}: got {function.name!r}, whose parameters {', '.join(by_place)} have "
            "no name; allowed: parameters that are given by name, as TRL does"
        )
    taken = [name for name in function.arguments if name in _BATCH]
    unknown = [name for name in function.arguments if name not in function.parameters]
    if taken or (unknown and not function.takes_any):
        raise ConfigError(
            f"reward.arguments: got {dict(function.arguments)}, which {function.name!r} does not "
            f"take; allowed: parameters of {inspect.signature(function.call)} but for "
            f"{', '.join(_BATCH)}"
        )
