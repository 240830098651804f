"""Turns of conversations: read from records in all their spellings, passed on to chat templates.

A message may have more keys than a role and a content: calls of tools, the id of a call, a name,
the reasoning before an answer. They travel with the turn as JSON text (`Turn.further`). Keys of the
whole conversation (its tools and documents) travel with one of its turns, so that code that passes
turns on cannot lose them, and reach the template as arguments of their own.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from halos_jax.config.field_names import CHATS
from halos_jax.data.records.fields import Fields
from halos_jax.data.records.json_door import find_faults, parse_json
from halos_jax.json_text import JsonObject
from halos_jax.types import Turn

# The keys that chat templates read: of a whole conversation, then of a turn.
CONTEXT = ("tools", "documents")
REASONING = ("reasoning_content", "reasoning", "thinking")
KEYS = (*CONTEXT, *REASONING, "tool_calls", "tool_call_id", "name")
# Roles of turns that answer a call by the assistant.
TOOLS = ("tool", "function", "ipython", "observation")
ASKING = ("user", *TOOLS)
_WEIGHTS = ("weight", "train", "loss")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# ShareGPT's names of the roles; a call of a function is a turn of the assistant.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
# A list of turns as Python prints it, which looks like JSON and is not.
_PRINTED = re.compile(r"""\s*(?:array\()?\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


def pack(keys: Mapping[str, Any]) -> str:
    """Return a turn's further keys as JSON text (`Turn.further`); "" if there are none.

    Equal keys give equal text. Inside a value the order of keys is kept: templates print it.
    """
    keys = {name: keys[name] for name in sorted(keys)}
    return json.dumps(keys, ensure_ascii=False, separators=(",", ":")) if keys else ""


def unpack(turn: Turn) -> JsonObject:
    """Return a turn's further keys."""
    return json.loads(turn.further) if turn.further else {}


def turns_to_record(turns: Iterable[Turn]) -> list[JsonObject]:
    """Return turns as the list of objects that files hold; `read_turns` inverts it."""
    return [
        {"role": turn.role, "content": turn.content}
        | unpack(turn)
        | ({} if turn.learned else {"weight": 0})
        for turn in turns
    ]


def add_context(turns: Sequence[Turn], context: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns with the keys of the whole conversation (`CONTEXT`) added to the first."""
    if not context or not turns:
        return tuple(turns)
    first = dataclasses.replace(turns[0], further=pack(unpack(turns[0]) | dict(context)))
    return (first, *turns[1:])


def find_context(turns: Iterable[Turn]) -> JsonObject:
    """Return the keys of the whole conversation (`CONTEXT`) with their values."""
    found: JsonObject = {}
    for turn in turns:
        found |= {name: value for name, value in unpack(turn).items() if name in CONTEXT}
    return found


def drop_keys(turn: Turn) -> Iterator[tuple[str, Turn]]:
    """Yield each key of an answer that must not be lost, and the turn without that key."""
    keys = unpack(turn)
    for name in keys:
        if name in (*REASONING, "tool_calls"):
            less = {other: value for other, value in keys.items() if other != name}
            yield name, dataclasses.replace(turn, further=pack(less))


def strip_context(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Return the turns without the keys of the whole conversation, to compare them."""
    stripped = []
    for turn in turns:
        keys = {name: value for name, value in unpack(turn).items() if name not in CONTEXT}
        stripped.append(dataclasses.replace(turn, further=pack(keys)))
    return tuple(stripped)


def speaks_of(template: str, name: str) -> bool:
    """Return whether a chat template mentions a key; for a key of reasoning, any of these."""
    names = REASONING if name in REASONING else (name,)
    return any(_find_name(template, one) for one in names)


def _find_name(template: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])", template) is not None


def _name_reasoning(keys: JsonObject, template: str) -> JsonObject:
    """Return a turn's keys, with its reasoning under the name that the template reads."""
    known = [name for name in REASONING if _find_name(template, name)]
    given = [name for name in REASONING if name in keys]
    if not known or not given or set(known) & set(given):
        return keys
    return {known[0] if name == given[0] else name: value for name, value in keys.items()}


def make_messages(
    turns: Iterable[Turn],
    change: Callable[[str], str],
    change_answers: Callable[[str], str] | None = None,
    *,
    template: str = "",
    spell_calls: bool = False,
) -> tuple[list[JsonObject], JsonObject]:
    """Return the messages and the further arguments with which a chat template is rendered.

    Args:
      change: applied to every text, including the texts of tools and calls.
      change_answers: applied instead of `change` to the texts of the assistant's turns.
      template: the template; reasoning is given the name that it reads.
      spell_calls: give the arguments of calls as JSON text; else as objects, however they came.
    """
    messages: list[JsonObject] = []
    context: JsonObject = {}
    for turn in turns:
        change_own = change_answers if turn.role == "assistant" and change_answers else change
        message = {"role": turn.role, "content": change_own(turn.content)}
        if turn.further:
            keys = _name_reasoning(unpack(turn), template)
            if "tool_calls" in keys:
                calls = keys["tool_calls"]
                keys["tool_calls"] = [_set_arguments(one, spell_calls) for one in calls]
            keys = {name: _change_text(value, change_own) for name, value in keys.items()}
            context |= {name: keys.pop(name) for name in CONTEXT if name in keys}
            message |= keys
        messages.append(message)
    return messages, context


def _change_text(value: object, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change_text(item, change) for item in value]
    if isinstance(value, dict):
        return {change(name): _change_text(item, change) for name, item in value.items()}
    return value


def _set_arguments(call: Any, spell: bool) -> Any:
    """Return a call with its arguments as text or as an object; templates differ in which they
    expect."""
    inner = call.get("function") if isinstance(call, dict) else None
    if not isinstance(inner, dict) or "arguments" not in inner:
        return call
    arguments = inner["arguments"]
    if isinstance(arguments, str) and not spell:
        value = _parse(arguments)
        arguments = value if isinstance(value, dict) else arguments
    elif isinstance(arguments, dict) and spell:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": inner | {"arguments": arguments}}


# --------------------------------------------------------------------------- reading


def read_turns(fields: Fields, name: str, text_role: str) -> tuple[Turn, ...]:
    """Return the turns of a field, at least one; a string becomes one turn of `text_role`.

    A turn is an object with `role` and `content` (text, or a list of text parts), or ShareGPT's
    with `from` and `value`. `weight`, `train` or `loss` of an answer say whether it is learned.

    Raises:
      RecordError: for a wrong type, or for an image or other content that is not text.
    """
    value = fields.get(name)
    if isinstance(value, str) and (name in CHATS or fields.texts):
        listed = _parse(value)  # tables hold turns as JSON text
        value = listed if _is_list_of_turns(listed) else value
    if isinstance(value, str):
        if (name in CHATS or fields.texts) and _PRINTED.match(value):
            raise fields.error(
                name,
                value,
                "turns, or their JSON text; this is a list as Python prints it: write it with "
                "json.dumps, or keep the table as Parquet or JSON Lines",
            )
        return (Turn(text_role, fields.text(name)),)
    if isinstance(value, dict):  # LlamaFactory's pairs hold a single turn, without a list
        return (_read_turn(fields, name, value),)
    if not isinstance(value, list) or not value:
        raise fields.error(name, value, "a string or a non-empty list of turns")
    return tuple(_read_turn(fields, f"{name}[{index}]", turn) for index, turn in enumerate(value))


def _is_list_of_turns(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)


def refuse_unlearned(fields: Fields, name: str, answer: Turn) -> None:
    """Raise RecordError if the only answer that a record is there to teach has weight 0."""
    if not answer.learned:
        raise fields.error(
            f"{name}[].weight", 0, "1 or no weight, since the record has no other answer to learn"
        )


def read_context(fields: Fields) -> JsonObject:
    """Return the keys of a record that belong to its whole conversation: tools, documents."""
    return _read_context(fields, "", fields.record, fields.get)


def _read_turn(fields: Fields, at: str, turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise fields.error(at, turn, "an object with 'role' and 'content'")
    ignored = fields.edits.ignored
    turn = {name: one for name, one in turn.items() if one is not None and name not in ignored}
    spelled = "from" if "role" not in turn and "from" in turn else "role"
    role = fields.check_text(f"{at}.{spelled}", turn.get(spelled))
    if not role:
        raise fields.error(f"{at}.{spelled}", role, "a non-empty string")
    name = "value" if "content" not in turn and "value" in turn else "content"
    keys = _read_keys(fields, at, turn)
    content = turn.get(name, "" if "tool_calls" in keys else None)
    content = _read_content(fields, f"{at}.{name}", content)
    if role in _CALLS and "tool_calls" not in keys:
        keys["tool_calls"] = _parse_calls(fields, f"{at}.{name}", content)
        content = ""
    learned = _read_weight(fields, at, turn, _ROLES.get(role, role))
    known = {spelled, name, *KEYS, *_WEIGHTS}
    known |= set() if turn.get("tool_calls") else {"function_call"}
    fields.leave(
        f"{at.partition('[')[0]}[].{key}"
        for key, value in turn.items()
        if key not in known and value not in ("", [], {})
    )
    return Turn(_ROLES.get(role, role), content, pack(keys), learned)


def _read_content(fields: Fields, at: str, content: object) -> str:
    """Return a content as text; text parts are joined without a separator, as templates do."""
    if not isinstance(content, list):
        return fields.check_text(at, content, "a string (valid Unicode) or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise fields.error(
                f"{at}[{index}]", part if kind is None else kind, "a part of the type 'text'"
            )
        texts.append(fields.check_text(f"{at}[{index}].text", part.get("text")))
        fields.leave(
            f"{at.partition('[')[0]}[].content[].{key}"
            for key in part
            if key not in ("type", "text") and part[key] is not None
        )
    return "".join(texts)


def _read_keys(fields: Fields, at: str, turn: Mapping[str, Any]) -> JsonObject:
    """Return those further keys of a turn that templates read; empty ones count as absent."""
    for name in _MEDIA:
        if turn.get(name):
            raise fields.error(f"{at}.{name}", turn[name], "text alone; leave the record out")
    keys = _read_context(fields, f"{at}.", turn, turn.get)
    for name in (*REASONING, "tool_call_id", "name"):
        if turn.get(name) not in (None, ""):
            keys[name] = fields.check_text(f"{at}.{name}", turn[name])
    calls = turn.get("tool_calls")
    if calls is None and turn.get("function_call"):  # OpenAI's older form
        calls = [{"type": "function", "function": turn["function_call"]}]
    if calls not in (None, [], ""):
        keys["tool_calls"] = _check_calls(fields, f"{at}.tool_calls", calls)
    for fault in find_faults(keys):  # possible in tables, whose values were never JSON
        raise fields.error(f"{at}.{fault.field}", fault.got, fault.allowed)
    return keys


def _read_context(
    fields: Fields, prefix: str, values: Mapping[str, Any], get: Callable[[str], Any]
) -> JsonObject:
    context = {}
    for name in CONTEXT:
        if values.get(name) in (None, [], "") or name in fields.edits.ignored:
            continue
        value = get(name)
        if isinstance(value, str):  # tables hold them as JSON text
            value = _parse(value)
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise fields.error(
                f"{prefix}{name}", values[name], "a list of objects, or its JSON text"
            )
        for fault in find_faults(value):
            raise fields.error(f"{prefix}{name}{fault.field}", fault.got, fault.allowed)
        if value:
            context[name] = value
    return context


def _check_calls(fields: Fields, at: str, calls: object) -> list[JsonObject]:
    given = calls
    calls = _parse(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not calls:
        raise fields.error(at, given, "a list of calls, or its JSON text")
    for index, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise fields.error(
                f"{at}[{index}]", call, "an object with 'function', which has 'name', 'arguments'"
            )
    return calls


def _parse_calls(fields: Fields, at: str, content: str) -> list[JsonObject]:
    """Return the calls in a ShareGPT turn of the role function_call, which holds JSON text."""
    value = _parse(content)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(one, dict) and "name" in one for one in calls):
        raise fields.error(at, content, "JSON text of an object with 'name' and 'arguments'")
    calls = [{"type": "function", "function": one} for one in calls]
    return _check_calls(fields, at, calls)


def _parse(text: str) -> Any:
    """Return the value of a JSON text, or None if it is not JSON."""
    text = text.strip()
    try:
        value, end = parse_json(text)
    except ValueError:
        return None
    return value if end == len(text) else None


def _read_weight(fields: Fields, at: str, turn: Mapping[str, Any], role: str) -> bool:
    """Return whether a turn may be learned: False for an answer with weight 0."""
    said = {name: turn[name] for name in _WEIGHTS if name in turn}
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise fields.error(f"{at}.{name}", value, "0 or 1 (whether an answer is learned)")
    if len({bool(value) for value in said.values()}) > 1:
        raise fields.error(at, said, f"one of {', '.join(_WEIGHTS)}")
    if role != "assistant" and any(said.values()):
        raise fields.error(
            at, said, f"no such key in a turn of the {role}: only answers are learned"
        )
    return role != "assistant" or all(map(bool, said.values()))
