"""Ready reward functions, for `reward.function="halos_jax.rewards.functions:NAME"`.

Each takes the prompt (a list of {"role", "content"}), the response's text and, if it needs the
reference answer, the other fields of the prompt's record. Its further parameters come from
`reward.arguments`. The reward depends on nothing else.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeVar

from halos_jax.rewards.numbers import find_answer, read_reference_answer

Turns = Sequence[Mapping[str, str]]

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
    "any": (object,),
}


CHECK = "check_arguments"  # attribute of a function that holds the check of its arguments
_Reward = TypeVar("_Reward", bound=Callable[..., float])


class ReferenceAnswerError(ValueError):
    """A prompt's record has no usable reference answer."""


def checked_by(check: Callable[..., list[str]]) -> Callable[[_Reward], _Reward]:
    """Attach a check of its arguments, which returns error lines, to a reward function."""

    def add(function: _Reward) -> _Reward:
        setattr(function, CHECK, check)
        return function

    return add


def exact_answer(
    prompt: Turns,
    response: str,
    record: Mapping[str, Any],
    *,
    field: str = "answer",
    after: str = "",
    ignore_case: bool = False,
) -> float:
    """Return 1 if the response is the reference answer, or one of several, else 0.

    White space at both ends is ignored.

    Args:
      field: the record's field with the reference answer: a string or a list of strings.
      after: compare what follows the last occurrence of this text; a response without it is wrong.
      ignore_case: treat upper and lower case as equal.
    """
    answers = _get_field(record, field)
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(one, str) for one in answers):
        raise ReferenceAnswerError(
            f"field {field!r}: got {answers!r}, allowed: a string or a list of strings"
        )
    if after:
        _, found, response = response.rpartition(after)
        if not found:
            return 0.0
    fold = str.casefold if ignore_case else str
    return float(fold(response.strip()) in {fold(one.strip()) for one in answers})


def _check_tolerance(*, tolerance: float = 0.0, **_: object) -> list[str]:
    known = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not (known and 0 <= tolerance < float("inf")):
        return [f"tolerance: got {tolerance!r}, allowed: a number of 0 or more"]
    return []


@checked_by(_check_tolerance)
def numeric_answer(
    prompt: Turns,
    response: str,
    record: Mapping[str, Any],
    *,
    field: str = "answer",
    tolerance: float = 1e-6,
) -> float:
    r"""Return 1 if the response's final number is the reference answer's, else 0, as for GSM8K.

    The final number is the one in the last `\boxed{}`, else after the last "####", else after the
    last "answer is" or "answer:", else the last one. Units, currency signs and thousands separators
    are dropped; 1/2, \frac{1}{2} and 0.5 are equal.

    Args:
      field: the record's field with the reference answer: a number, or text with one
        number or a marker.
      tolerance: allowed difference; relative to the reference answer if that is above 1.
    """
    answer = _get_field(record, field)
    wanted = read_reference_answer(answer)
    if wanted is None:
        raise ReferenceAnswerError(
            f"field {field!r}: got {answer!r}, allowed: a number, or text that has one number "
            "alone or one after '####' or in '\\boxed{}'"
        )
    found = find_answer(response)
    if found is None:
        return 0.0
    # Compare fractions, since a number of 400 digits does not fit in a float.
    return float(abs(found - wanted) <= Fraction(tolerance) * max(Fraction(1), abs(wanted)))


def _check_length(*, target: int = 0, limit: int = 0, unit: str = "characters") -> list[str]:
    errors = []
    if unit not in ("characters", "words"):
        errors.append(f"unit: got {unit!r}, allowed: 'characters', 'words'")
    for name, value in (("target", target), ("limit", limit)):
        if type(value) is not int or value < 0:
            errors.append(f"{name}: got {value!r}, allowed: an integer of 0 or more (0: off)")
    if not errors and not (target or limit):
        errors.append("target: got 0, and so is limit; allowed: one of them above 0, or both")
    return errors


@checked_by(_check_length)
def length(
    prompt: Turns,
    response: str,
    *,
    target: int = 0,
    limit: int = 0,
    unit: Literal["characters", "words"] = "characters",
) -> float:
    """Return a reward of 0 or less for how far the response is from a target or beyond a limit.

    Args:
      target: adds -|length - target| / target; 0: off.
      limit: adds -(length - limit) / limit if the response is longer; 0: off.
      unit: what the length counts; words are separated by white space.
    """
    size = len(response.split()) if unit == "words" else len(response)
    reward = -abs(size - target) / target if target else 0.0
    return reward - (max(size - limit, 0) / limit if limit else 0.0)


def _check_pattern(*, pattern: str, **_: object) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        return [f"pattern: got {pattern!r}, allowed: a regular expression ({error})"]
    return []


@checked_by(_check_pattern)
def regular_expression(prompt: Turns, response: str, *, pattern: str, whole: bool = False) -> float:
    """Return 1 if `pattern` matches somewhere in the response (`whole`: all of it), else 0.

    Flags are part of the pattern, as in "(?is)yes".
    """
    compiled = re.compile(pattern)
    return float(bool((compiled.fullmatch if whole else compiled.search)(response)))


def _check_json(*, keys: object = (), **_: object) -> list[str]:
    if isinstance(keys, Mapping):
        return [
            f"keys.{key}: got {kind!r}, allowed: {', '.join(_JSON_TYPES)}"
            for key, kind in keys.items()
            if kind not in _JSON_TYPES
        ]
    if isinstance(keys, (list, tuple)) and all(isinstance(key, str) for key in keys):
        return []
    return [f"keys: got {keys!r}, allowed: a list of strings, or a mapping from key to type"]


@checked_by(_check_json)
def valid_json(
    prompt: Turns,
    response: str,
    *,
    keys: Sequence[str] | Mapping[str, str] = (),
    fenced: bool = True,
) -> float:
    """Return 1 if the response is JSON (RFC 8259) and has the keys asked for, else 0.

    Args:
      keys: keys that the JSON object must have; a mapping also gives the type of each value, as in
        JSON Schema ("string", "integer", "number", "boolean", "array", "object", "null") or "any".
      fenced: if the whole response is one ``` block, read the contents of the block.
    """
    match = _FENCE.fullmatch(response) if fenced else None
    try:
        value = json.loads(match[1] if match else response, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    wanted = keys if isinstance(keys, Mapping) else dict.fromkeys(keys, "any")
    if not wanted:
        return 1.0
    if not isinstance(value, dict):
        return 0.0
    return float(all(key in value and _has_type(value[key], wanted[key]) for key in wanted))


def _has_type(value: object, kind: str) -> bool:
    if isinstance(value, bool):  # in Python, also a number
        return kind in ("boolean", "any")
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _JSON_TYPES[kind])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _get_field(record: Mapping[str, Any], field: str) -> Any:
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        known = ", ".join(map(repr, sorted(record))) or "no other fields"
        raise ReferenceAnswerError(
            f"field {field!r}: got nothing, allowed: the reference answer; the record has {known}; "
            "name the field with reward.arguments.field"
        )
    return value
