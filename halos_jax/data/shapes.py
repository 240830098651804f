"""The shapes that a record may have: HALOs', TRL's, chat messages, instructions and questions.

Each function takes the `Fields` of one record and raises RecordError, with the field, where the
record is of no shape that it knows.
"""

import dataclasses
import math
from typing import Any

from halos_jax.data.fields import Fields
from halos_jax.data.records import (
    judgement_from_record,
    make_prompt_id,
    preference_from_record,
)
from halos_jax.data.turns import ASKING, add_context, read_context, read_turns, strip_context
from halos_jax.types import (
    FINISH_LENGTH,
    FINISH_STOP,
    Completion,
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Turn,
)

_PROMPT_FIELDS = ("prompt", "messages", "instruction", "question")
_TARGET_FIELDS = ("completion", "output", "response", "answer")
# Fields with a meaning of their own; everything else of a record becomes the prompt's `extra`.
_STRUCTURE = (
    {"prompt", "messages", "instruction", "input", "question", "prompt_id", "prompt_ids"}
    | {"type", "split", "extra", "dataset", "label", "chosen", "rejected", "reward_difference"}
    | {"response_ids", "logps", "ids_A", "ids_B"}
    | {
        name + side
        for name in ("output", "reward", "generator", "finish_reason", "sample_id")
        for side in ("", "_A", "_B")
    }
)


def read_prompt(fields: Fields) -> Prompt:
    """Return the prompt of any record; its id is a hash of its turns where it has none."""
    return _make_prompt(fields, _read_prompt_turns(fields))


def _make_prompt(fields: Fields, turns: tuple[Turn, ...]) -> Prompt:
    """Make the Prompt of a record from its turns, which must end with what asks for an answer."""
    if not turns or turns[-1].role not in ASKING:
        roles = [turn.role for turn in turns]
        raise fields.error(
            _prompt_field(fields), roles, "turns of which the last is the user's, or a tool's"
        )
    if turns[-1].role == "user" and not turns[-1].content.strip():
        raise fields.error(_prompt_field(fields), turns[-1].content, "a last turn with some text")
    known = fields.has("prompt_id")
    turns = add_context(turns, read_context(fields))
    prompt_id = fields.identifier("prompt_id") if known else make_prompt_id(turns)
    return Prompt(prompt_id, turns, _read_extra(fields), fields.place)


def _prompt_field(fields: Fields) -> str:
    present = [name for name in (*_PROMPT_FIELDS, "chosen") if fields.has(name)]
    return present[0] if present else "prompt"


def _read_prompt_turns(fields: Fields) -> tuple[Turn, ...]:
    field = _prompt_field(fields)
    if field == "messages":
        turns = read_turns(fields, "messages", "user")
        last = max((i for i, turn in enumerate(turns) if turn.role in ASKING), default=-1)
        return turns[: last + 1]
    if field == "instruction" and fields.text("input", ""):
        return (Turn("user", f"{fields.text('instruction')}\n\n{fields.text('input')}"),)
    if field == "chosen":  # TRL lets the prompt stand inside both outputs, before the answer
        return read_turns(fields, "chosen", "assistant")[:-1]
    return read_turns(fields, field, "user")


def _read_extra(fields: Fields) -> dict[str, Any]:
    """Return the record's other fields; what JSON cannot hold (an image, a NaN) is left out."""
    extra = fields.mapping("extra") | {
        name: value
        for name, value in fields.record.items()
        if name not in _STRUCTURE and value is not None
    }
    return {name: value for name, value in extra.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def is_feedback(fields: Fields) -> bool:
    """Say whether a record judges outputs, of which a prompt may have several."""
    kind = fields.record.get("type")
    scored = kind in ("sample", "scalar_feedback") and fields.has("reward")
    return scored or kind == "binary_feedback" or fields.has("output_A")


def read_demonstration(fields: Fields, *, every_turn: bool = True) -> Demonstration:
    """Return the prompt of a record and what the assistant should answer to it.

    Args:
      every_turn: of `messages`, learn all turns of the assistant behind one of the user; else the
        last turn alone.
    """
    if fields.has("chosen"):
        prompt = read_prompt(fields)
        return Demonstration(prompt, Completion((_read_answer(fields, "chosen", prompt.turns),)))
    target = next((name for name in _TARGET_FIELDS if fields.has(name)), None)
    if target and _prompt_field(fields) != "messages":
        prompt = read_prompt(fields)
        answer = _read_answer(fields, target, prompt.turns)
        return Demonstration(prompt, _complete(fields, answer), fields.ids("prompt_ids"))
    if not fields.has("messages"):
        raise fields.error(
            "completion", None, f"one of {', '.join(_TARGET_FIELDS)}, chosen, messages"
        )
    turns = read_turns(fields, "messages", "user")
    if turns[-1].role != "assistant":
        roles = [turn.role for turn in turns]
        raise fields.error("messages", roles, "turns of which the last is the assistant's")
    start, end = (_find_answers if every_turn else _find_last)(fields, turns)
    return Demonstration(_make_prompt(fields, turns[:start]), Completion(turns[start:end]))


def _complete(fields: Fields, answer: Turn) -> Completion:
    """Return the completion of a record with what else it says of it (of a sample: its tokens)."""
    return Completion(
        turns=(answer,),
        ids=fields.ids("response_ids"),
        reward=fields.number("reward"),
        finish_reason=fields.choice("finish_reason", (FINISH_STOP, FINISH_LENGTH), FINISH_STOP),
    )


def _find_answers(fields: Fields, turns: tuple[Turn, ...]) -> tuple[int, int]:
    """Return the first answer right behind a question that is learned, and the end of the last."""
    learned = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned:
        raise fields.error("messages", "weight 0 in each answer", "an answer that is learned")
    answers = [i for i in learned if i and turns[i - 1].role in ASKING]
    return (answers or learned[-1:])[0], learned[-1] + 1


def _find_last(fields: Fields, turns: tuple[Turn, ...]) -> tuple[int, int]:
    if not turns[-1].learned:
        raise fields.error(
            f"messages[{len(turns) - 1}].weight", 0, "1, as data.learn_turns=last learns this turn"
        )
    return len(turns) - 1, len(turns)


def read_preference(fields: Fields) -> Preference:
    """Return the preference of a pairwise_feedback or chosen/rejected record."""
    if fields.has("output_A") or fields.record.get("type") == "pairwise_feedback":
        prompt = read_prompt(fields)
        record = dict(fields.record) | {"prompt_id": prompt.prompt_id, "extra": {}}
        found = preference_from_record(record, file=fields.file, line=fields.line)
        return dataclasses.replace(found, prompt=prompt)
    if not fields.has("chosen") and fields.has("label"):
        raise fields.error(
            "chosen",
            None,
            "a pair; a record with a label is an answer alone, for loss.name=kto, say",
        )
    prompt = read_prompt(fields)
    chosen, rejected = (
        Completion((_read_answer(fields, name, prompt.turns),)) for name in ("chosen", "rejected")
    )
    return Preference(prompt, chosen, rejected)


def read_judgement(fields: Fields) -> Judgement:
    """Return the judgement of a binary_feedback record, or of TRL's with completion and label."""
    target = next((name for name in _TARGET_FIELDS if fields.has(name)), None)
    if target is None:
        raise fields.error("completion", None, f"one of {', '.join(_TARGET_FIELDS)}, chosen")
    prompt = read_prompt(fields)
    if fields.record.get("type") == "binary_feedback":
        record = dict(fields.record) | {"prompt_id": prompt.prompt_id, "extra": {}}
        found = judgement_from_record(record, file=fields.file, line=fields.line)
        return dataclasses.replace(found, prompt=prompt)
    completion = Completion((_read_answer(fields, target, prompt.turns),))
    return Judgement(prompt, completion, fields.label())


def _read_answer(fields: Fields, name: str, prompt: tuple[Turn, ...]) -> Turn:
    """Return the one assistant turn of a field that may repeat the prompt before it."""
    turns = strip_context(read_turns(fields, name, "assistant"))
    shown = turns[: len(prompt)] == strip_context(prompt)
    answer = turns[len(prompt) :] if shown else turns
    if [turn.role for turn in answer] != ["assistant"]:
        roles = [turn.role for turn in turns]
        raise fields.error(
            name, roles, "one turn of the assistant, alone or after the prompt's turns"
        )
    return answer[0]
