"""Typed access to the fields of one record, with errors that name file, line and field."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.errors import UserError
from halos_jax.types import Turn


class RecordError(UserError, ValueError):
    """A record or file that cannot be used, with file, line and field in the message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to one record; every getter raises RecordError on a wrong type.

    A field that is null counts as absent. Getters without a default require the field.
    """

    record: Mapping[str, Any]
    file: str = "record"
    line: int = 0

    def error(self, field: str, got: Any, allowed: str) -> RecordError:
        """Make (not raise) the error of one field."""
        shown = "nothing" if got is None else shorten(got)
        place = f"{self.file} line {self.line}" if self.line else self.file
        return RecordError(f"{place}: field {field!r}: got {shown}, allowed: {allowed}")

    def has(self, *names: str) -> bool:
        """Return whether every one of the fields is there."""
        return all(self.record.get(name) is not None for name in names)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or not _is_unicode(value):
            raise self.error(name, value, "a string (valid Unicode)")
        return value

    def identifier(self, name: str) -> str:
        """Return a non-empty id; whole numbers, as HALOs writes them, become text."""
        value = self.record.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value or not _is_unicode(value):
            raise self.error(name, value, "a non-empty string or an integer")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, value, "an integer")
        return value

    def number(self, name: str) -> float | None:
        """Return a finite number, or None where the field is absent."""
        value = self.record.get(name)
        if value is not None and not _is_number(value):
            raise self.error(name, value, "a finite number")
        return None if value is None else float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Return token ids, or () where the field is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(
            type(item) is int and item >= 0 for item in value
        ):
            raise self.error(name, value, "a list of token ids (integers of 0 or more)")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a tuple of finite numbers, or None where the field is absent."""
        value = self.record.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self.error(name, value, "a list of finite numbers")
        return tuple(map(float, value))

    def label(self, name: str = "label") -> bool:
        """Return a label given as 0 or 1, whole, float or boolean."""
        value = self.record.get(name)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise self.error(name, value, "0 or 1")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self._get(name, default)
        if value not in allowed:
            raise self.error(name, value, ", ".join(map(repr, allowed)))
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object field, or {} where it is absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def turns(self, name: str, text_role: str) -> tuple[Turn, ...]:
        """Return a non-empty list of turns; a string becomes one turn of `text_role`."""
        value = self.record.get(name)
        if isinstance(value, str):
            return (Turn(text_role, self.text(name)),)
        if not isinstance(value, list) or not value:
            raise self.error(name, value, "a string or a non-empty list of turns")
        turns = []
        for index, turn in enumerate(value):
            at = f"{name}[{index}]"
            if not isinstance(turn, dict):
                raise self.error(at, turn, "an object with 'role' and 'content'")
            role, content = turn.get("role"), turn.get("content")
            if not isinstance(role, str) or not role or not _is_unicode(role):
                raise self.error(f"{at}.role", role, "a non-empty string")
            if not isinstance(content, str) or not _is_unicode(content):
                raise self.error(f"{at}.content", content, "a string (valid Unicode)")
            turns.append(Turn(role, content))
        return tuple(turns)

    def _get(self, name: str, default: Any) -> Any:
        value = self.record.get(name)
        return default if value is None else value


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair, which no tokenizer or file can take.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shorten(value: Any, length: int = 80) -> str:
    """Return `value` as it may stand in an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
