"""Typed access to the fields of one record, with errors that name file, line and field."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halos_jax.errors import UserError

_LARGEST, _VOCABULARY = 2**63 - 1, 2**31


class RecordError(UserError, ValueError):
    """A record or file that cannot be used, with file, line and field in the message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to one record; every getter raises RecordError on a wrong type.

    A field that is null counts as absent. Getters without a default require the field. What was
    asked for by a getter counts as read.

    Attributes:
      used: names of the fields that were read.
      left: what inside of fields was not read, as "messages[].id".
    """

    record: Mapping[str, Any]
    file: str = "record"
    line: int = 0
    used: set[str] = dataclasses.field(default_factory=set, compare=False)
    left: set[str] = dataclasses.field(default_factory=set, compare=False)

    @property
    def place(self) -> str:
        """Where the record stands, for errors and logs."""
        return f"{self.file} line {self.line}" if self.line else self.file

    def unread(self) -> set[str]:
        """Return the names of what the record says and nobody has read."""
        named = {name for name, value in self.record.items() if value is not None}
        return (named - self.used) | self.left

    def error(self, field: str, got: Any, allowed: str) -> RecordError:
        """Make (not raise) the error of one field."""
        shown = "nothing" if got is None else shorten(got)
        return RecordError(f"{self.place}: field {field!r}: got {shown}, allowed: {allowed}")

    def has(self, *names: str) -> bool:
        """Return whether every one of the fields is there."""
        return all(self.record.get(name) is not None for name in names)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field of any type."""
        self.used.add(name)
        value = self.record.get(name)
        return default if value is None else value

    def leave(self, names: Iterable[str]) -> None:
        """Note what inside of a field is not read."""
        self.left.update(names)

    def text(self, name: str, default: str | None = None) -> str:
        return self.check_text(name, self.get(name, default))

    def identifier(self, name: str) -> str:
        """Return a non-empty id; whole numbers, as HALOs writes them, become text."""
        value = self.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value or not _is_unicode(value):
            raise self.error(name, value, "a non-empty string or an integer")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int or abs(value) > _LARGEST:
            raise self.error(name, value, "an integer of at most 64 bits")
        return value

    def number(self, name: str) -> float | None:
        """Return a finite number, or None where the field is absent."""
        value = self.get(name)
        if value is not None and not _is_number(value):
            raise self.error(name, value, "a finite number")
        return None if value is None else float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Return token ids, or () where the field is absent."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(
            type(item) is int and 0 <= item < _VOCABULARY for item in value
        ):
            raise self.error(name, value, "a list of token ids (integers of 0 or more, 32 bits)")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a tuple of finite numbers, or None where the field is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self.error(name, value, "a list of finite numbers")
        return tuple(map(float, value))

    def label(self, name: str = "label") -> bool:
        """Return a label given as 0 or 1, whole, float or boolean."""
        value = self.get(name)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise self.error(name, value, "0 or 1")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self.get(name, default)
        if value not in allowed:
            raise self.error(name, value, ", ".join(map(repr, allowed)))
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object field, or {} where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def check_text(self, at: str, value: Any, allowed: str = "a string (valid Unicode)") -> str:
        """Return a value inside of the record as text; `at` is its place for the error."""
        if not isinstance(value, str) or not _is_unicode(value):
            raise self.error(at, value, allowed)
        return value


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair, which no tokenizer or file can take.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _is_number(value: Any) -> bool:
    """Say whether a value is a number that a float can hold."""
    if type(value) is int:
        return abs(value) <= _LARGEST
    return type(value) is float and math.isfinite(value)


def shorten(value: Any, length: int = 80) -> str:
    """Return `value` as it may stand in an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
