"""Fields whose turns must fit together: a prompt and its answer, two answers, a history."""

from halos_jax.config.field_names import PAIR, SYSTEMS
from halos_jax.data.records.edits import merge_turns
from halos_jax.data.records.fields import Fields
from halos_jax.data.records.turns import (
    add_context,
    find_context,
    read_context,
    read_turns,
    refuse_unlearned,
    strip_context,
)
from halos_jax.types import Turn

_ALONE = "one turn of the assistant, alone or after the prompt's turns"


def read_history(fields: Fields) -> tuple[Turn, ...]:
    """Return the turns of `history`, a list of [question, answer] or of turns.

    A string in this field is no history, and is not read.
    """
    history = fields.peek("history")
    if not isinstance(history, list) or not history:
        return ()
    fields.get("history")
    if all(isinstance(one, dict) for one in history):
        return read_turns(fields, "history", "user")
    turns = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.error(f"history[{index}]", pair, "a question and its answer")
        for place, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, fields.check_text(f"history[{index}][{place}]", pair[place])))
    return tuple(turns)


def strip_prompt(fields: Fields, name: str, prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns of a field without the prompt, and its system turn, if it repeats them.

    Raises:
      RecordError: if they have tools or documents that neither the prompt nor the record has.
    """
    whole = read_turns(fields, name, "assistant")
    for key, value in find_context(whole).items():
        if (find_context(prompt) | read_context(fields)).get(key) != value:
            raise fields.error(f"{name}[].{key}", value, f"the {key} of the prompt or the record")
    turns, prompt = strip_context(whole), strip_context(prompt)
    if turns[: len(prompt)] == prompt:
        return turns[len(prompt) :]
    systems = [fields.peek(name) for name in SYSTEMS if fields.has(name)]
    if turns[0].role == "system" and turns[0].content in systems:
        return turns[1 + len(prompt) :] if turns[1 : 1 + len(prompt)] == prompt else turns
    return turns


def split_pair(
    fields: Fields, prompt: tuple[Turn, ...] | None
) -> tuple[tuple[Turn, ...], tuple[Turn, Turn]]:
    """Return the turns before the answers of a chosen/rejected record, and the two answers.

    Args:
      prompt: the turns of the prompt if it has a field of its own; None if both answers begin with
        it.

    Raises:
      RecordError: if the answers are not turns of the assistant, or follow different turns.
    """
    shared, context = prompt or (), {}
    if prompt is None:
        wholes = [read_turns(fields, name, "assistant") for name in PAIR]
        context, other = map(find_context, wholes)
        for key in context.keys() | other.keys():
            if context.get(key) != other.get(key):
                allowed = f"the {key} of 'chosen': it is one conversation"
                raise fields.error(f"rejected[].{key}", other.get(key), allowed)
        chosen, rejected = map(strip_context, wholes)
    else:
        chosen, rejected = (
            merge_turns(fields, strip_prompt(fields, name, prompt)) for name in PAIR
        )
    for name, turns in zip(PAIR, (chosen, rejected), strict=True):
        if not turns or turns[-1].role != "assistant":
            raise fields.error(name, [turn.role for turn in turns], _ALONE)
        refuse_unlearned(fields, name, turns[-1])
    histories = chosen[:-1], rejected[:-1]
    if histories[0] != histories[1]:
        raise fields.error("rejected", *_compare(*histories, len(shared)))
    if prompt is not None and histories[0] and histories[0][0].role != "assistant":
        roles = [turn.role for turn in chosen]
        raise fields.error("chosen", roles, f"{_ALONE}, which must be those of the field 'prompt'")
    return (*shared, *add_context(histories[0], context)), (chosen[-1], rejected[-1])


def _compare(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], before: int) -> tuple[str, str]:
    """Return how two histories differ, and what is allowed, for an error."""
    allowed = (
        "a pair of answers to one conversation: the turns before the last answer of 'chosen' and "
        "of 'rejected' must be the same; cut both after the turn in which they first differ"
    )
    for index in range(max(len(chosen), len(rejected))):
        one, other = (turns[index : index + 1] for turns in (chosen, rejected))
        if one != other:
            shown = [
                f"{turn[0].role}: {turn[0].content}" if turn else "nothing" for turn in (one, other)
            ]
            number = before + index + 1
            return f"turn {number} as {shown[1]!r}, which in 'chosen' is {shown[0]!r}", allowed
    return "the same history", allowed
