"""Strict JSON for records: it refuses values that no tokenizer, file or float can hold.

Python's parser accepts NaN, which JSON does not have, numbers too large for a float (1e400) and
lone surrogates, and keeps the last of two fields with the same name. Here each of these is an error
that names the field.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from halos_jax.json_text import MAX_DEPTH, JsonObject, is_unicode

_MAX_BITS = 14_000  # of an integer: Python writes at most 4300 digits
_UNICODE = "valid Unicode (half of a surrogate pair is no character)"
_DEPTH = f"lists and objects at most {MAX_DEPTH} deep"
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonFault(ValueError):
    """A value that a record cannot have.

    Attributes:
      field: its path in the record.
      got: the value.
      allowed: what the field may hold.
      end: where the JSON value that holds it ends in the parsed text, if that is known.
    """

    def __init__(self, field: str, got: object, allowed: str):
        super().__init__(f"field {field!r}: got {got!r}, allowed: {allowed}")
        self.field, self.got, self.allowed = field, got, allowed
        self.end: int | None = None


@dataclasses.dataclass(frozen=True)
class _Odd:
    """A placeholder for a parsed value that is not allowed."""

    got: Any
    allowed: str


def parse_json(text: str, at: int = 0) -> tuple[Any, int]:
    """Parse the JSON value that starts at a character; return it and where it ends.

    Raises:
      JsonFault: for a value that a record cannot have.
      ValueError: if the text is not JSON.
    """
    try:
        value, end = _STRICT.raw_decode(text, at)
    except RecursionError:
        raise JsonFault(_find_deep(text, at), "more", _DEPTH) from None
    except ValueError:
        value, end = _parse_odd(text, at)
    else:
        # A cheap test, which almost all records pass.
        part = text if not at and end == len(text) else text[at:end]
        if part.count("[") + part.count("{") <= MAX_DEPTH and not _SURROGATE.search(part):
            return value, end
    for fault in find_faults(value):
        fault.end = end
        raise fault
    return value, end


def _parse_odd(text: str, at: int) -> tuple[Any, int]:
    try:
        return _LENIENT.raw_decode(text, at)
    except RecursionError:
        raise JsonFault(_find_deep(text, at), "more", _DEPTH) from None


def find_faults(value: object, field: str = "", depth: int = 1) -> Iterator[JsonFault]:
    """Yield an error for each part of a value that a record cannot have, from JSON or not."""
    if isinstance(value, _Odd):
        yield JsonFault(field, value.got, value.allowed)
    elif isinstance(value, (dict, list)) and depth > MAX_DEPTH:
        yield JsonFault(field, "more", _DEPTH)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or not is_unicode(name):
                yield JsonFault(field, name, f"names that are text, {_UNICODE}")
            else:
                yield from find_faults(item, f"{field}.{name}" if field else name, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_faults(item, f"{field}[{index}]", depth + 1)
    elif isinstance(value, str):
        if not is_unicode(value):
            yield JsonFault(field, value, _UNICODE)
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield JsonFault(field, value, "a finite number")
    elif type(value) is int:
        if value.bit_length() > _MAX_BITS:
            yield JsonFault(field, f"{value.bit_length()} bits", "an integer that can be written")
    elif value is not None and type(value) is not bool:
        yield JsonFault(field, type(value).__name__, "text, numbers, booleans, lists and objects")


def _find_deep(text: str, at: int) -> str:
    """Return the field that holds what is nested too deep; "" if the text is no object."""
    depth, name = 0, ""
    for found in _TOKENS.finditer(text, at):
        token = found[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        elif depth == 1:
            name = token
        if depth > MAX_DEPTH:
            break
    try:
        field: str = json.loads(name)
        return field
    except ValueError:  # the text is a list, or no JSON at all
        return ""


# --------------------------------------------------------------------------- parsers


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is more than a number holds")
    return value


def _read_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands twice in one object")
    return found


def _mark_constant(name: str) -> _Odd:
    return _Odd(name, "a finite number (JSON has no other)")


def _mark_float(text: str) -> float | _Odd:
    value = float(text)
    return _Odd(text, "a finite number") if math.isinf(value) else value


def _mark_integer(text: str) -> int | _Odd:
    limit = sys.get_int_max_str_digits()
    if limit and len(text) > limit:
        return _Odd(text, f"an integer of at most {limit} digits")
    return int(text)


def _mark_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    found: JsonObject = {}
    for name, value in pairs:
        twice = _Odd("two values", "a field once") if name in found else value
        found[name] = twice
    return found


_STRICT = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_read_float, object_pairs_hook=_read_object
)
_LENIENT = json.JSONDecoder(
    parse_constant=_mark_constant,
    parse_float=_mark_float,
    parse_int=_mark_integer,
    object_pairs_hook=_mark_object,
)
