"""Typed access to the fields of one record, with errors that name file, line and field."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from halos_jax.config.field_names import KNOWN
from halos_jax.data.records.json_door import parse_json
from halos_jax.errors import UserError
from halos_jax.json_text import JsonObject, is_unicode

_LARGEST, _VOCABULARY = 2**63 - 1, 2**31
_FLOAT32 = 3.4028234e38
_SHOWN = 8  # names of fields in an error
_HEAD = re.compile(r"[^.\[]+")


class RecordError(UserError, ValueError):
    """A record or file that cannot be used, with file, line and field in the message."""


@dataclasses.dataclass(frozen=True)
class Edits:
    """What the config changes in records as they are read; see `data/records/edits.py`.

    Attributes:
      names: our name for a field -> the records' name.
      change: a function from a record to a record, or to None for one that is left out.
      template: the template of the prompt, as pairs (text, the field that follows it).
      system: the system prompt for conversations without one.
      merge: join system turns, and consecutive turns of the same role.
      skip: leave out bad records.
      ignored: fields of records and keys of turns that are not read, on purpose.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    change: Callable[[JsonObject], Any] | None = None
    template: tuple[tuple[str, str], ...] = ()
    system: str = ""
    merge: bool = False
    skip: bool = False
    ignored: frozenset[str] = frozenset()


NO_EDITS = Edits()


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to one record; every getter raises RecordError on a wrong type.

    A field that is null or ignored counts as absent. Getters without a default require the field.
    A field counts as read once a getter has asked for it.

    Attributes:
      edits: the names of the fields, and other changes.
      texts: whether all values are text, as in CSV, so that numbers and lists are parsed.
      unit: what `line` counts, "line" or "row".
      used: the fields that were read, by the record's names ("meta.text" for a nested one).
      left: parts of fields that were not read, such as "messages[].id".
    """

    record: Mapping[str, Any]
    file: str = "record"
    line: int = 0
    edits: Edits = NO_EDITS
    texts: bool = False
    unit: str = "line"
    used: set[str] = dataclasses.field(default_factory=set, compare=False)
    left: set[str] = dataclasses.field(default_factory=set, compare=False)

    @property
    def place(self) -> str:
        """The record's file and line, for errors and logs."""
        return f"{self.file} {self.unit} {self.line}" if self.line else self.file

    def unread(self) -> set[str]:
        """Return the names of unread fields, and parts of fields, that hold something."""
        return set(self._list_unread(self.record, "")) | self.left

    def _list_unread(self, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Yield the names of unread values; of a partly read object, the names of unread parts."""
        for name, value in values.items():
            path = f"{prefix}{name}"
            if value in (None, "", [], {}) or path in self.used:
                continue
            if isinstance(value, Mapping) and any(one.startswith(f"{path}.") for one in self.used):
                yield from self._list_unread(value, f"{path}.")
            else:
                yield path

    def name_of(self, name: str) -> str:
        """Return the record's name for one of our fields."""
        return self.edits.names.get(name, name)

    def error(self, field: str, got: object, allowed: str) -> RecordError:
        """Return (do not raise) the error for a field, or for a part of it ("turns[1].role")."""
        shown = "nothing" if got is None else shorten(got)
        absent = got is None and field in KNOWN and not self.has(field)
        field = _HEAD.sub(lambda head: self.name_of(head[0]), field, count=1)
        if absent:
            allowed = f"{allowed}; the record has {self._list_names()}"
        return RecordError(f"{self.place}: field {field!r}: got {shown}, allowed: {allowed}")

    def _list_names(self) -> str:
        """Return the names of the record's fields that hold something, for an error."""
        names = [name for name, value in self.record.items() if value is not None]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        if not names and self.record:
            return f"nothing but null (in {', '.join(map(shorten, list(self.record)[:_SHOWN]))})"
        return f"{', '.join(map(shorten, names[:_SHOWN]))}{more}" if names else "no fields"

    def peek(self, name: str) -> Any:
        """Return a field of any type without marking it as read; None if it is absent."""
        name = self.name_of(name)
        if name in self.edits.ignored:
            return None
        value = self.record.get(name)
        if value is None and "." in name:
            value = self.record
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def has(self, *names: str) -> bool:
        """Return whether all of the fields are there."""
        return all(self.peek(name) is not None for name in names)

    def get(self, name: str, default: object = None) -> Any:
        """Return a field of any type."""
        raw = self.name_of(name)
        self.used.add(raw)
        value = self.peek(name)
        return default if value is None else value

    def parsed(self, name: str, default: object = None) -> Any:
        """Return a field of any type; where all values are text (`texts`), parse it."""
        value = self.get(name, default)
        if not self.texts or not isinstance(value, str):
            return value
        try:
            found, end = parse_json({"True": "true", "False": "false"}.get(value, value))
        except ValueError:
            return value
        return found if end == len(value) else value

    def leave(self, names: Iterable[str]) -> None:
        """Note parts of fields that are not read."""
        self.left.update(names)

    def text(self, name: str, default: str | None = None) -> str:
        return self.check_text(name, self.get(name, default))

    def identifier(self, name: str) -> str:
        """Return a non-empty id; whole numbers, as HALOs writes them, become text."""
        value = self.get(name)
        if type(value) is int and abs(value) <= _LARGEST:
            return str(value)
        if not isinstance(value, str) or not value or not is_unicode(value):
            raise self.error(name, value, "a non-empty string or an integer")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.parsed(name, default)
        if type(value) is not int or abs(value) > _LARGEST:
            raise self.error(name, value, "an integer of at most 64 bits")
        return value

    def number(self, name: str) -> float | None:
        """Return a finite number, or None if the field is absent."""
        value = self.parsed(name)
        if value is not None and not _is_number(value):
            raise self.error(name, value, "a finite number")
        return None if value is None else float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Return token ids, or () if the field is absent."""
        value = self.parsed(name, [])
        if not isinstance(value, list) or not all(
            type(item) is int and 0 <= item < _VOCABULARY for item in value
        ):
            raise self.error(name, value, "a list of token ids (integers of 0 or more, 32 bits)")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a tuple of finite numbers, or None if the field is absent."""
        value = self.parsed(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self.error(name, value, "a list of finite numbers")
        return tuple(map(float, value))

    def label(self, name: str = "label") -> bool:
        """Return a label given as 0 or 1: an integer, a float or a boolean."""
        value = self.parsed(name)
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise self.error(name, value, "0 or 1")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self.get(name, default)
        for one in allowed:
            if value == one:
                return one
        raise self.error(name, value, ", ".join(map(repr, allowed)))

    def mapping(self, name: str) -> JsonObject:
        """Return an object, or {} if the field is absent."""
        value = self.parsed(name, {})
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def check_text(self, at: str, value: object, allowed: str = "a string (valid Unicode)") -> str:
        """Return a value inside the record as text; `at` is its path, for the error."""
        if not isinstance(value, str) or not is_unicode(value):
            raise self.error(at, value, allowed)
        return value


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that is finite in float32 too."""
    return type(value) in (int, float) and abs(value) <= _FLOAT32


def shorten(value: object, length: int = 80) -> str:
    """Return `value` as text for an error message, cut to `length` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits; a list that contains itself
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."
