"""The prompt of a record in any spelling: a text, turns, an instruction with its input."""

import dataclasses
from collections.abc import Mapping

from halos_jax.config.field_names import CHATS, PROMPTS
from halos_jax.data.records.edits import add_system, fill_template, merge_turns
from halos_jax.data.records.fields import Fields
from halos_jax.data.records.formats import make_prompt_id, read_extra
from halos_jax.data.records.histories import read_history
from halos_jax.data.records.turns import (
    ASKING,
    add_context,
    find_context,
    read_context,
    read_turns,
)
from halos_jax.types import Prompt, Turn

# The name under which turns of a conversation after the question are reported as unread.
_BEHIND = "{}[behind-the-question]"


# The field of a question -> the fields that may hold what it is about.
_FURTHER: Mapping[str, tuple[str, ...]] = {
    "instruction": ("input", "context"),
    "question": ("context",),
}


def read_prompt(fields: Fields) -> Prompt:
    """Return the prompt of any record, to be answered.

    A prompt without an id is given a hash of its turns. `extra` holds the record's other fields.
    """
    field, turns, whole = read_question(fields)
    prompt = make_prompt(fields, turns)
    hidden = {fields.name_of(field)} if whole else set()
    fields.left.discard(_BEHIND.format(fields.name_of(field)))  # it is in `extra`
    return dataclasses.replace(prompt, extra=read_extra(fields, hidden))


def has_prompt(fields: Fields) -> bool:
    return bool(fields.edits.template) or find_field(fields, PROMPTS) is not None


def read_question(fields: Fields) -> tuple[str, tuple[Turn, ...], bool]:
    """Return the field of a record's prompt, its turns, and whether the field holds no more."""
    if fields.edits.template:
        return "", (Turn("user", fill_template(fields)),), True
    field = find_field(fields, (*PROMPTS, "chosen"))
    if field is None:
        raise fields.error(
            "prompt", None, f"one of {', '.join(PROMPTS)}; data.fields='prompt=FIELD' names another"
        )
    turns = read_turns(fields, field, "user")
    if field == "chosen":  # in TRL's records both outputs may begin with the prompt
        return field, turns[:-1], False
    if field in CHATS:
        last = max((i for i, turn in enumerate(turns) if turn.role in ASKING), default=-1)
        if last + 1 < len(turns):
            fields.leave([_BEHIND.format(fields.name_of(field))])
        return field, turns[: last + 1], last + 1 == len(turns)
    if turns == (Turn("user", fields.peek(field)),):  # a text, not turns as the text of a table
        further = _FURTHER.get(field, ())
        texts = [turns[0].content, *(_read_further(fields, name) for name in further)]
        question = Turn("user", "\n\n".join(text for text in texts if text))
        turns = (*read_history(fields), question)
    return field, turns, True


def _read_further(fields: Fields, name: str) -> str:
    """Return a text that a question is about; "" for another type, such as a list of documents."""
    if name == "context" and not isinstance(fields.peek(name), str):
        return ""
    return fields.text(name, "")


def make_prompt(fields: Fields, turns: tuple[Turn, ...], *, identified: bool = False) -> Prompt:
    """Make the Prompt of a record from its turns; the last must be one that asks for an answer.

    With `identified` the record must have a prompt id.
    """
    plain = turns
    turns = merge_turns(fields, add_system(fields, turns))
    if not turns or turns[-1].role not in ASKING:
        roles = [turn.role for turn in turns]
        allowed = "turns that end with the user's, or a tool's"
        if not turns:
            allowed = f"{allowed}, before the answer; or one of {', '.join(PROMPTS)} beside it"
        raise fields.error(name_prompt(fields), roles, allowed)
    if turns[-1].role == "user" and not turns[-1].content.strip():
        raise fields.error(name_prompt(fields), turns[-1].content, "a last turn with some text")
    if fields.has("prompt_ids") and (turns != plain or fields.edits.template):
        raise fields.error(
            "prompt_ids",
            fields.peek("prompt_ids"),
            "text without token ids, since data.system_prompt, data.prompt_template or "
            "data.merge_turns change the prompt: leave the ids out of the records",
        )
    context, inner = read_context(fields), find_context(turns)
    for key in context.keys() & inner.keys():
        if context[key] != inner[key]:
            raise fields.error(key, context[key], f"the {key} of its turns, which differ; or none")
    turns = add_context(turns, context)
    known = identified or fields.has("prompt_id")
    prompt_id = fields.identifier("prompt_id") if known else make_prompt_id(turns)
    return Prompt(prompt_id, turns, place=fields.place)


def find_field(fields: Fields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if fields.has(name)), None)


def name_prompt(fields: Fields) -> str:
    return find_field(fields, (*PROMPTS, "chosen")) or "prompt"
