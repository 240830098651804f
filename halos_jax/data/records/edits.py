"""Changes that the config makes to records and conversations, so that files stay as they are.

In this order: `data.map` turns each record into another one, or leaves it out; `data.fields`
maps our names to its fields; `data.prompt_template` makes the prompt from them;
`data.system_prompt` is put before conversations without a system turn; `data.merge_turns` joins
turns for templates that want users and assistants to alternate.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos_jax.config import ConfigError, DataConfig
from halos_jax.config.field_names import SYSTEMS, parse_names, parse_template, split_names
from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.json_door import find_faults
from halos_jax.data.records.turns import add_context, find_context, strip_context
from halos_jax.json_text import JsonObject
from halos_jax.types import Turn
from halos_jax.user_code import explain_errors, import_function

_JOINT = "\n\n"
_MAP = "data.map"


def make_edits(data: DataConfig) -> Edits:
    """Return the changes that `data` makes to records as they are read.

    Raises:
      ConfigError: if the function of `data.map` cannot be imported, or a text cannot be read.
    """
    try:
        names, template = parse_names(data.fields), parse_template(data.prompt_template)
    except ValueError as error:
        raise ConfigError(f"data.fields, data.prompt_template: {error}") from error
    return Edits(
        names=names,
        change=_load_function(data.map) if data.map else None,
        template=tuple(template) if data.prompt_template else (),
        system=data.system_prompt,
        merge=data.merge_turns,
        skip=data.skip_bad,
        ignored=frozenset(split_names(data.ignore_fields)),
    )


def _load_function(name: str) -> Callable[[JsonObject], Any]:
    function = import_function(name, _MAP)

    def change(record: JsonObject) -> Any:
        with explain_errors(
            f"{_MAP} {name!r}",
            advice="it is called with a record and returns a record, or None to leave it out",
            error=RecordError,
        ):
            return function(record)

    return change


def change_record(fields: Fields) -> Fields | None:
    """Return a record as `data.map` changes it, or None if `data.map` leaves it out.

    Raises:
      RecordError: with file and line, if the function fails or does not return a record.
    """
    if fields.edits.change is None:
        return fields
    try:
        found = fields.edits.change(dict(fields.record))
    except RecordError as error:
        raise RecordError(f"{fields.place}: {error}") from error
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise RecordError(
            f"{fields.place}: {_MAP}: got a value of type {type(found).__name__}, allowed: a "
            "record (a dict), or None to leave it out"
        )
    try:
        record = _to_plain(dict(found))
    except RecursionError:
        raise RecordError(
            f"{fields.place}: what {_MAP} returned: lists or objects that contain themselves"
        ) from None
    for fault in find_faults(record):
        raise RecordError(f"{fields.place}: what {_MAP} returned: {fault}")
    return dataclasses.replace(fields, record=record)


def _to_plain(value: Any) -> Any:
    """Return a value with NumPy's scalars and arrays as numbers and lists, and tuples as lists."""
    if isinstance(value, dict):
        return {name: _to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    is_array = hasattr(value, "tolist") and not isinstance(value, type)
    return value.tolist() if is_array else value


def fill_template(fields: Fields) -> str:
    """Return the prompt that `data.prompt_template` makes from a record.

    Raises:
      RecordError: if the record lacks a field, or its value is neither text nor a number.
    """
    parts = []
    for text, name in fields.edits.template:
        parts.append(text)
        if not name:
            continue
        value = fields.get(name)
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise fields.error(name, value, "text or a number, for data.prompt_template")
        parts.append(value if isinstance(value, str) else str(value))
    return "".join(parts)


def add_system(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns after the record's system prompt or, if it has none, the config's.

    Raises:
      RecordError: if the record has two that differ.
    """
    said = {
        turn.content: f"a turn of the role {turn.role}" for turn in turns if turn.role == "system"
    }
    found = ""
    for name in SYSTEMS:
        text = fields.text(name, "") if fields.has(name) else ""
        if text and said and text not in said:
            other = next(iter(said.values()))
            raise fields.error(name, text, f"one system prompt (there is {other}, which differs)")
        if text and not said:
            found, said = text, {text: f"the field {fields.name_of(name)!r}"}
    found = found or ("" if said else fields.edits.system)
    if not found:
        return turns
    return (Turn("system", found), *turns)


def merge_turns(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns with system turns and consecutive turns of one role joined, if asked for.

    The text of a system turn is put before that of the next user turn, with an empty line between.
    Turns that call tools, reason or answer a call are not joined.

    Raises:
      RecordError: if no turn of the user follows a system turn.
    """
    if not fields.edits.merge:
        return turns
    try:
        return join_turns(turns)
    except ValueError as error:
        raise RecordError(
            f"{fields.place}: got a system turn that no turn of the user follows, allowed with "
            "data.merge_turns: one before a turn of the user, to which it is joined"
        ) from error


def join_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return turns as `merge_turns` joins them.

    Raises:
      ValueError: if no turn of the user follows a system turn.
    """
    joined: list[Turn] = []
    waiting = ""
    context = find_context(turns)
    for turn in strip_context(turns):
        if turn.role == "system" and not turn.further:
            waiting = _join(waiting, turn.content)
            continue
        if turn.role == "user" and waiting:
            turn, waiting = dataclasses.replace(turn, content=_join(waiting, turn.content)), ""
        last = joined[-1] if joined else None
        if last is not None and _can_join(last, turn):
            joined[-1] = dataclasses.replace(last, content=_join(last.content, turn.content))
        else:
            joined.append(turn)
    if waiting:
        raise ValueError("a system turn that no turn of the user follows")
    return add_context(joined, context)


def _can_join(last: Turn, turn: Turn) -> bool:
    alike = turn.role == last.role and turn.learned == last.learned
    return alike and turn.role in ("user", "assistant") and not (turn.further or last.further)


def _join(first: str, second: str) -> str:
    return _JOINT.join(text for text in (first, second) if text)
