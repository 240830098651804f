"""The answers in a record, whatever its shape: HALOs', TRL's, chats, instructions, questions.

Each function takes the `Fields` of one record. It raises RecordError, which names the field, if the
record has no shape that it knows.
"""

import dataclasses

from halos_jax.config.field_names import ANSWERS, CHATS, SAMPLE_TYPES, SCORES
from halos_jax.data.records.edits import merge_turns
from halos_jax.data.records.fields import Fields
from halos_jax.data.records.formats import (
    make_prompt_id,
    read_binary,
    read_pairwise,
    read_sample,
)
from halos_jax.data.records.histories import split_pair, strip_prompt
from halos_jax.data.records.questions import (
    find_field,
    has_prompt,
    make_prompt,
    name_prompt,
    read_question,
)
from halos_jax.data.records.turns import ASKING, read_turns, refuse_unlearned
from halos_jax.types import (
    FINISH_LENGTH,
    FINISH_STOP,
    Completion,
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)


def is_feedback(fields: Fields) -> bool:
    """Return whether a record is feedback on an output; a prompt may have several outputs."""
    kind = fields.peek("type")
    scored = kind in ("sample", "scalar_feedback") and fields.has("reward")
    return scored or kind == "binary_feedback" or fields.has("output_A")


def read_demonstration(fields: Fields, *, every_turn: bool = True) -> Demonstration:
    """Return a record's prompt together with the answer to learn.

    Args:
      every_turn: in a conversation, learn every assistant turn that follows a question; else only
        the last turn.
    """
    refuse_weight(fields)
    chat = find_field(fields, CHATS)
    name = _find_answer_field(fields)
    if fields.has("chosen"):
        return _finish(fields, "chosen", every_turn)
    if name and (fields.edits.template or name_prompt(fields) not in CHATS):
        found = _finish(fields, name, every_turn)
        if len(found.completion.turns) > 1:
            return found
        completion = _complete(fields, found.completion.turns[0])
        return dataclasses.replace(
            found, completion=completion, prompt_ids=fields.ids("prompt_ids")
        )
    if chat and fields.edits.template:
        raise fields.error(
            "completion",
            None,
            f"the answer to data.prompt_template's prompt in {', '.join(ANSWERS)}",
        )
    if chat:
        turns = merge_turns(fields, read_turns(fields, chat, "user"))
        return _learn(fields, chat, turns, every_turn)
    if fields.has("text") and not has_prompt(fields):
        return _read_text(fields)
    allowed = f"one of {', '.join(ANSWERS)}, chosen, {', '.join(CHATS)}, text"
    raise fields.error(
        "completion", None, f"{allowed}; data.fields='completion=FIELD' names another"
    )


def read_preference(fields: Fields, *, margins: bool = False) -> Preference:
    """Return the preference of a pairwise_feedback or chosen/rejected record.

    Args:
      margins: refuse a record that has neither a margin nor the rewards of both answers.
    """
    found = _read_pair(fields)
    if margins and found.chosen.reward is None:
        raise fields.error(
            "margin",
            None,
            "a number, or score_chosen and score_rejected; loss.margin asks for their difference "
            "between the scores; or --config.loss.margin=0",
        )
    return found


def _read_pair(fields: Fields) -> Preference:
    if fields.has("output_A") or fields.peek("type") == "pairwise_feedback":
        _, turns, _ = read_question(fields)
        return read_pairwise(fields, make_prompt(fields, turns))
    refuse_weight(fields)
    if not fields.has("chosen") and fields.has("label"):
        raise fields.error(
            "chosen",
            None,
            "a pair; a record with a label judges a single answer, as loss.name=kto learns from",
        )
    if not fields.has("chosen") and not fields.has("rejected"):
        raise fields.error(
            "chosen",
            None,
            "chosen and rejected, or output_A and output_B: a pair of answers; task=online "
            "makes pairs from prompts, task=label from samples",
        )
    turns, answers = split_pair(fields, read_question(fields)[1] if has_prompt(fields) else None)
    prompt = make_prompt(fields, turns)
    rewards = _read_rewards(fields)
    chosen, rejected = (
        Completion((answer,), reward=reward)
        for answer, reward in zip(answers, rewards, strict=True)
    )
    return Preference(prompt, chosen, rejected)


def read_scored(fields: Fields) -> Sample:
    """Return the sample in a record, with its reward if it has one."""
    turns = read_turns(fields, find_field(fields, ("prompt", "instruction")) or "prompt", "user")
    return read_sample(fields, make_prompt(fields, turns, identified=True))


def read_judgement(fields: Fields) -> Judgement:
    """Return the judgement in a binary_feedback record, or in TRL's completion and label."""
    refuse_weight(fields)
    name, chat = _find_answer_field(fields), find_field(fields, CHATS)
    if name is None and chat:
        return _judge_chat(fields, chat)
    if name is None:
        raise fields.error("completion", None, f"one of {', '.join((*ANSWERS, 'chosen', *CHATS))}")
    _, turns, _ = read_question(fields)
    prompt = make_prompt(fields, turns)
    if fields.peek("type") == "binary_feedback":
        return read_binary(fields, prompt)
    answer = _read_answer(fields, name, turns)
    return Judgement(prompt, Completion((answer,)), fields.label())


def _judge_chat(fields: Fields, name: str) -> Judgement:
    """Return the judgement that a record gives on the last turn of a conversation."""
    turns = merge_turns(fields, read_turns(fields, name, "user"))
    if fields.edits.template or turns[-1].role != "assistant":
        roles = [turn.role for turn in turns]
        raise fields.error(name, roles, "turns that end with the assistant's, which is judged")
    refuse_unlearned(fields, name, turns[-1])
    prompt = make_prompt(fields, turns[:-1])
    return Judgement(prompt, Completion(turns[-1:]), fields.label())


def _find_answer_field(fields: Fields) -> str | None:
    names: tuple[str, ...] = ANSWERS
    if name_prompt(fields) == "problem":  # its `solution` ends with its `answer`: prefer the whole
        names = tuple(sorted(ANSWERS, key=lambda name: name == "answer"))
    return find_field(fields, names)


# --------------------------------------------------------------------------- answers


def _finish(fields: Fields, name: str, every_turn: bool) -> Demonstration:
    """Return the demonstration in a field that holds an answer or the rest of a conversation."""
    if name != "chosen" or has_prompt(fields):
        _, turns, _ = read_question(fields)
        rest = strip_prompt(fields, name, turns)
    else:
        whole = read_turns(fields, name, "assistant")
        turns, rest = whole[:-1], whole[-1:]
    if [turn.role for turn in rest] == ["assistant"]:
        refuse_unlearned(fields, name, rest[0])
        return Demonstration(make_prompt(fields, turns), Completion(rest))
    if not rest or rest[0].role != "assistant" or rest[-1].role != "assistant":
        raise fields.error(
            name,
            [turn.role for turn in rest],
            "turns of the assistant's, alone or after the prompt's turns",
        )
    return _learn(fields, name, merge_turns(fields, (*turns, *rest)), every_turn)


def _read_answer(fields: Fields, name: str, prompt: tuple[Turn, ...]) -> Turn:
    """Return the single assistant turn of a field, which may repeat the prompt before it."""
    answer = merge_turns(fields, strip_prompt(fields, name, prompt))
    if [turn.role for turn in answer] != ["assistant"]:
        roles = [turn.role for turn in answer]
        raise fields.error(
            name, roles, "one turn of the assistant, alone or after the prompt's turns"
        )
    refuse_unlearned(fields, name, answer[0])
    return answer[0]


def _learn(fields: Fields, name: str, turns: tuple[Turn, ...], every_turn: bool) -> Demonstration:
    """Return a conversation as a demonstration; its last turn must be the assistant's."""
    if turns[-1].role != "assistant":
        roles = [turn.role for turn in turns]
        raise fields.error(name, roles, "turns that end with the assistant's")
    start, end = (_find_answers if every_turn else _find_last)(fields, name, turns)
    return Demonstration(make_prompt(fields, turns[:start]), Completion(turns[start:end]))


def _find_answers(fields: Fields, name: str, turns: tuple[Turn, ...]) -> tuple[int, int]:
    """Return where the turns to learn begin and end: the first learned answer to a question (or,
    without one, the last learned answer), and behind the last learned answer."""
    learned = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned:
        raise fields.error(name, "weight 0 in each answer", "an answer with weight 1")
    answers = [i for i in learned if i and turns[i - 1].role in ASKING]
    return (answers or learned[-1:])[0], learned[-1] + 1


def _find_last(fields: Fields, name: str, turns: tuple[Turn, ...]) -> tuple[int, int]:
    if not turns[-1].learned:
        raise fields.error(
            f"{name}[{len(turns) - 1}].weight", 0, "1, since data.learn_turns=last learns this turn"
        )
    return len(turns) - 1, len(turns)


def _complete(fields: Fields, answer: Turn) -> Completion:
    """Return an answer as a completion, with its tokens, reward and finish reason if given."""
    sampled = fields.peek("type") in SAMPLE_TYPES
    return Completion(
        turns=(answer,),
        ids=fields.ids("response_ids"),
        reward=fields.number("reward") if sampled else None,
        finish_reason=fields.choice("finish_reason", (FINISH_STOP, FINISH_LENGTH), FINISH_STOP),
    )


def _read_text(fields: Fields) -> Demonstration:
    """Return the plain text of a record as a demonstration without a prompt."""
    text = fields.text("text")
    if not text.strip():
        raise fields.error("text", text, "some text")
    if fields.edits.system:
        raise fields.error("text", text, "a conversation: plain text takes no data.system_prompt")
    turns = (Turn("", text),)
    return Demonstration(Prompt(make_prompt_id(turns), (), place=fields.place), Completion(turns))


# --------------------------------------------------------------------------- numbers


def _read_rewards(fields: Fields) -> tuple[float | None, float | None]:
    """Return the rewards of a pair's answers; (margin, 0) if the record has only a margin."""
    first: float | None = None
    second: float | None = None
    for pair in SCORES:
        if not any(map(fields.has, pair)):
            continue
        for name, other in (pair, pair[::-1]):
            if not fields.has(name):
                raise fields.error(
                    name, None, f"a number, since {other!r} has one; or neither of them"
                )
        if first is None:
            first, second = fields.number(pair[0]), fields.number(pair[1])
    margin = fields.number("margin")
    if margin is None:
        return first, second
    if first is None or second is None:
        return margin, 0.0
    if abs(first - second - margin) > 1e-4 * max(1, abs(margin)):
        raise fields.error(
            "margin", margin, f"the difference of the answers' scores, {first - second:g}"
        )
    return first, second


def refuse_weight(fields: Fields) -> None:
    """Refuse a weight other than 1, which only records of pairwise_feedback have, for pair losses.

    Raises:
      RecordError: if the record has one.
    """
    value = fields.peek("weight")
    if type(value) in (int, float) and value != 1:
        raise fields.error(
            "weight",
            value,
            "nothing: of records, only pairwise_feedback has weights, for losses on pairs (turns "
            "have 0 or 1); leave it out or repeat it, or set data.ignore_fields=weight",
        )
