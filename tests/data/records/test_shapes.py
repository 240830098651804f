"""Every record shape gives the same prompts, demonstrations and preferences; bad ones are named."""

import json
import re

import pytest

from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.formats import make_prompt_id
from halos_jax.data.records.questions import read_prompt
from halos_jax.data.records.shapes import (
    is_feedback,
    read_demonstration,
    read_judgement,
    read_preference,
)
from halos_jax.data.records.turns import find_context, unpack
from halos_jax.types import Turn


def read(reader, record, edits=None, **options):
    return reader(Fields(record, "data.jsonl", 2, edits or Edits()), **options)


def turn(role, content):
    return {"role": role, "content": content}


USER = (Turn("user", "q"),)
DIALOG = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "q")]
DIALOG_TURNS = tuple(Turn(**value) for value in DIALOG)


IDLE = {"role": "assistant", "content": "a", "weight": 0}


def pairwise(label, a="good", b="bad", **more):
    outputs = {"output_A": [turn("assistant", a)], "output_B": [turn("assistant", b)]}
    return {"type": "pairwise_feedback", "prompt": "q", "label": label, **outputs, **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "completion": " a\n"}, (USER, " a\n")),
        ({"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]}, (USER, "a")),
        ({"instruction": "q", "output": "a"}, (USER, "a")),
        ({"prompt": "q", "response": "a"}, (USER, "a")),
        ({"question": "q", "answer": "a"}, (USER, "a")),
        ({"messages": [*DIALOG, turn("assistant", "a")]}, (DIALOG_TURNS, "a")),
        ({"prompt": "q", "messages": [turn("user", "q"), turn("assistant", "a")]}, (USER, "a")),
        ({"prompt": "q", "chosen": "a"}, (USER, "a")),
        (
            {"prompt": "q", "chosen": [turn("user", "q"), turn("assistant", "a")], "rejected": "b"},
            (USER, "a"),
        ),
        ({"type": "sample", "prompt": "q", "output": "a", "sample_id": 0}, (USER, "a")),
    ],
)
def test_demonstration_shapes(record, expected):
    demonstration = read(read_demonstration, record)
    turns = demonstration.prompt.turns + demonstration.completion.turns
    assert turns == (*expected[0], Turn("assistant", expected[1]))


def test_a_conversation_is_learned_from_its_first_answer_on_or_at_its_end():
    a, b, c, d, e = (turn(*pair) for pair in zip(["user", "assistant"] * 3, "abcde"))
    every = read(read_demonstration, {"messages": [turn("system", "s"), a, b, c, d]})
    assert every.prompt.turns == (Turn("system", "s"), Turn("user", "a"))
    assert every.completion.turns == tuple(Turn(**one) for one in (b, c, d))
    last = read(read_demonstration, {"messages": [a, b, c, d]}, every_turn=False)
    assert last.prompt.turns == tuple(Turn(**one) for one in (a, b, c))
    assert last.completion.turns == (Turn(**d),)
    greeted = read(read_demonstration, {"messages": [turn("assistant", "hi"), e, d]})
    assert greeted.prompt.turns == (Turn("assistant", "hi"), Turn(**e))


def test_a_sample_keeps_its_tokens():
    sample = {"type": "sample", "prompt": "q", "output": "a", "finish_reason": "length"}
    found = read(read_demonstration, sample | {"prompt_ids": [1, 2], "response_ids": [3]})
    assert (found.prompt_ids, found.completion.ids) == ((1, 2), (3,))
    assert found.completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (pairwise(1), True),
        ({"type": "binary_feedback"}, True),
        ({"type": "scalar_feedback", "reward": 1}, True),
        ({"type": "sample", "reward": 0.0}, True),
        ({"type": "sample"}, False),
        ({"prompt": "q", "completion": "a"}, False),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, False),
    ],
)
def test_what_is_feedback(record, expected):
    assert is_feedback(Fields(record)) is expected


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q"}, "completion"),
        ({"prompt": "q", "completion": 3}, "completion"),
        ({"prompt": "q", "completion": [turn("user", "a")]}, "completion"),
        ({"messages": DIALOG}, "messages"),
        ({"messages": [turn("assistant", "a")]}, "messages"),
    ],
)
def test_bad_demonstrations_are_errors(record, field):
    with pytest.raises(RecordError, match=re.escape(f"line 2: field {field!r}: got ")):
        read(read_demonstration, record)


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (pairwise(1), USER),
        (pairwise(0, a="bad", b="good"), USER),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, USER),
        (
            {
                "prompt": DIALOG,
                "chosen": [turn("assistant", "good")],
                "rejected": [turn("assistant", "bad")],
            },
            DIALOG_TURNS,
        ),
        (
            {
                "chosen": [*DIALOG, turn("assistant", "good")],
                "rejected": [*DIALOG, turn("assistant", "bad")],
            },
            DIALOG_TURNS,
        ),
        (
            {
                "prompt": "q",
                "chosen": [turn("user", "q"), turn("assistant", "good")],
                "rejected": [turn("user", "q"), turn("assistant", "bad")],
            },
            USER,
        ),
    ],
)
def test_preference_shapes(record, turns):
    fields = Fields(record | {"source": "x"})
    preference = read_preference(fields)
    assert "source" in fields.unread() and not {"prompt", "chosen", "output_A"} & fields.unread()
    assert preference.prompt.turns == turns
    assert preference.chosen.turns == (Turn("assistant", "good"),)
    assert preference.rejected.turns == (Turn("assistant", "bad"),)
    assert preference.prompt.prompt_id == make_prompt_id(turns)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected"),
        ({"prompt": "q", "completion": "a", "label": True}, "chosen"),
        ({"chosen": "Human: q", "rejected": "Human: q"}, "chosen"),
        (
            {
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "r"), turn("assistant", "b")],
            },
            "rejected",
        ),
        (
            {
                "prompt": "q",
                "chosen": [turn("assistant", "a"), turn("user", "b")],
                "rejected": "b",
            },
            "chosen",
        ),
        (pairwise(2), "label"),
    ],
)
def test_bad_preferences_are_errors(record, field):
    with pytest.raises(RecordError, match=re.escape(f"line 2: field {field!r}: got ")):
        read(read_preference, record)


def test_tokens_and_rewards_come_along():
    record = pairwise(0, reward_A=1, reward_B=2, ids_A=[1], ids_B=[2, 3], prompt_ids=[9])
    preference = read(read_preference, record)
    assert preference.prompt_ids == (9,)
    assert preference.chosen.ids == (2, 3) and preference.chosen.reward == 2.0
    assert preference.rejected.ids == (1,) and preference.rejected.reward == 1.0


def test_judgement_shapes():
    trl = read(read_judgement, {"prompt": "q", "completion": "a", "label": False})
    record = {"type": "binary_feedback", "prompt": "q", "output": "a", "label": 0}
    assert trl.prompt.turns == USER and trl.completion.turns == (Turn("assistant", "a"),)
    halos = read(read_judgement, record)
    assert not trl.desirable and not halos.desirable
    assert (halos.prompt.turns, halos.completion) == (trl.prompt.turns, trl.completion)


# --------------------------------------------------------------------------- what else is said

TOOLS = [{"type": "function", "function": {"name": "f"}}]
FROM = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def make(*turns):
    return tuple(Turn(*one.split(":")) for one in turns)


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"system": "s", "question": "q", "response": "a"}, make("system:s", "user:q"), "a"),
        ({"system_prompt": "s", "prompt": "q", "output": "a"}, make("system:s", "user:q"), "a"),
        ({"instruction": "q", "context": "c", "response": "a"}, make("user:q\n\nc"), "a"),
        (
            {"instruction": "q", "input": "i", "context": "", "output": "a"},
            make("user:q\n\ni"),
            "a",
        ),
        ({"question": "q", "context": "c", "answer": "a"}, make("user:q\n\nc"), "a"),
        (
            {"instruction": "q", "input": "", "output": "a", "history": [["x", "y"]]},
            make("user:x", "assistant:y", "user:q"),
            "a",
        ),
        ({"query": "q", "response": "a", "history": []}, USER, "a"),
        ({"problem": "q", "answer": "4", "solution": "a"}, USER, "a"),
        ({"question": "q", "answer": "a", "solution": "4"}, USER, "a"),
        ({"input": "q", "output": "a"}, USER, "a"),
        (FROM, USER, "a"),
        (FROM | {"system": "s"}, make("system:s", "user:q"), "a"),
        ({"conversation": [turn("user", "q"), turn("assistant", "a")]}, USER, "a"),
        ({"messages": json.dumps([turn("user", "q"), turn("assistant", "a")])}, USER, "a"),
    ],
)
def test_common_shapes_are_read_whole(record, prompt, answer):
    fields = Fields(record, "data.jsonl", 2)
    found = read_demonstration(fields)
    assert (found.prompt.turns, found.completion.turns) == (prompt, (Turn("assistant", answer),))
    assert fields.unread() <= {"answer", "solution"}
    assert read(read_prompt, record).turns == prompt


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"prompt": "q", "completion": "a", "meta": 1, "context": "c"}, {"meta", "context"}),
        ({"prompt": "q", "completion": "a", "history": "text"}, {"history"}),
        ({"question": "q", "answer": "a", "context": ["c"]}, {"context"}),
        ({"prompt": DIALOG, "completion": "a", "history": [["x", "y"]]}, {"history"}),
        ({"messages": [*DIALOG, turn("assistant", "a") | {"id": 1}]}, {"messages[].id"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"rejected"}),
        (
            {"messages": [turn("user", "q"), turn("assistant", "x")], "chosen": "a"},
            {"messages[behind-the-question]"},
        ),
    ],
)
def test_what_is_not_read_is_known(record, unread):
    fields = Fields(record)
    read_demonstration(fields)
    assert fields.unread() == unread


def test_tools_of_a_record_travel_with_its_prompt():
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [turn("user", "q"), turn("assistant", "") | call, turn("tool", "1")]
    record = {"tools": TOOLS, "messages": [*chat, turn("assistant", "a")]}
    found = read(read_demonstration, record)
    assert find_context(found.prompt.turns) == {"tools": TOOLS}
    assert [one.role for one in found.completion.turns] == ["assistant", "tool", "assistant"]
    assert unpack(found.completion.turns[0]) == call
    prompt = read(read_prompt, record)
    assert [one.role for one in prompt.turns] == ["user", "assistant", "tool"]
    assert find_context(prompt.turns) == {"tools": TOOLS}
    plain = read(read_prompt, {"prompt": [turn("user", "q")]})
    assert plain.prompt_id != read(read_prompt, {"prompt": "q", "tools": TOOLS}).prompt_id
    ignored = read(read_prompt, {"prompt": "q", "tools": TOOLS}, Edits(ignored={"tools"}))
    assert ignored.turns == USER
    pair = {"prompt": "q", "tools": TOOLS, "chosen": [turn("user", "q"), turn("assistant", "a")]}
    pair["rejected"] = [turn("user", "q"), turn("assistant", "b")]
    assert find_context(read(read_preference, pair).prompt.turns) == {"tools": TOOLS}


def test_answers_of_weight_0_are_read_and_not_learned():
    a, b, c, d = (turn(*pair) for pair in zip(["user", "assistant"] * 2, "abcd"))
    found = read(read_demonstration, {"messages": [a, b | {"weight": 0}, c, d | {"weight": 1}]})
    assert [one.content for one in found.prompt.turns] == ["a", "b", "c"]
    assert found.completion.turns == (Turn("assistant", "d"),)
    found = read(read_demonstration, {"messages": [a, b, c, d | {"weight": 0}]})
    assert found.completion.turns == (Turn("assistant", "b"),)
    messages = [a, b, c, d | {"weight": 0}]
    with pytest.raises(RecordError, match=r"field 'messages\[3\]\.weight': got 0"):
        read(read_demonstration, {"messages": messages}, every_turn=False)
    with pytest.raises(RecordError, match="field 'messages': got 'weight 0 in each answer'"):
        read(read_demonstration, {"messages": [a, b | {"weight": 0}]})


def test_a_plain_text_has_no_prompt():
    found = read(read_demonstration, {"text": "a document"})
    assert (found.prompt.turns, found.completion.turns) == ((), (Turn("", "a document"),))
    with pytest.raises(RecordError, match="field 'text': got ' ', allowed: some text"):
        read(read_demonstration, {"text": " "})
    with pytest.raises(RecordError, match=r"field 'text': .*data\.system_prompt"):
        read(read_demonstration, {"text": "a"}, Edits(system="s"))


def test_answers_of_several_turns_are_a_conversation():
    rest = [turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]
    for name in ("completion", "chosen"):
        found = read(read_demonstration, {"prompt": "q", name: rest})
        assert found.prompt.turns == USER
        assert found.completion.turns == make("assistant:a", "user:r", "assistant:b")


@pytest.mark.parametrize(
    ("numbers", "rewards"),
    [
        ({}, (None, None)),
        ({"margin": 3}, (3.0, 0.0)),
        ({"score_chosen": 8, "score_rejected": 2.5}, (8.0, 2.5)),
        ({"chosen_score": 0, "rejected_score": 0}, (0.0, 0.0)),
        ({"chosen-rating": 5, "rejected-rating": 4, "margin": 1}, (5.0, 4.0)),
        ({"rating_chosen": 5, "rating_rejected": 4}, (5.0, 4.0)),
    ],
)
def test_scores_and_margins_of_pairs(numbers, rewards):
    found = read(read_preference, {"prompt": "q", "chosen": "a", "rejected": "b", **numbers})
    assert (found.chosen.reward, found.rejected.reward) == rewards
    difference = read(read_preference, pairwise(0, reward_difference=2.0))
    assert (difference.chosen.reward, difference.rejected.reward) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("numbers", "field"),
    [
        ({"score_chosen": 8}, "score_rejected"),
        ({"rejected_score": 8}, "chosen_score"),
        ({"margin": "3"}, "margin"),
        ({"margin": True}, "margin"),
        ({"score_chosen": 8, "score_rejected": 2, "margin": 1}, "margin"),
        ({"score_chosen": 8, "score_rejected": 1e39}, "score_rejected"),
        ({"weight": 0.5}, "weight"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(numbers, field):
    record = {"prompt": "q", "chosen": "a", "rejected": "b", **numbers}
    with pytest.raises(RecordError, match=f"data.jsonl line 2: field '{field}': got"):
        read(read_preference, record)


def test_one_of_two_rewards_is_no_zero():
    with pytest.raises(RecordError, match="'reward_B': got nothing, allowed: a number, since"):
        read(read_preference, pairwise(1, reward_A=1.0))
    with pytest.raises(RecordError, match=r"line 2: field 'margin': got nothing.*score_chosen"):
        read(read_preference, pairwise(1), margins=True)
    assert read(read_preference, pairwise(1, reward_A=1.0, reward_B=1.0), margins=True)


@pytest.mark.parametrize(
    ("reader", "record", "field"),
    [
        (read_demonstration, {"prompt": "q", "completion": [IDLE]}, "completion"),
        (read_preference, {"prompt": "q", "chosen": [IDLE], "rejected": "b"}, "chosen"),
        (read_judgement, {"prompt": "q", "completion": [IDLE], "label": 1}, "completion"),
        (read_preference, pairwise(1) | {"output_A": [IDLE]}, "output_A"),
    ],
)
def test_an_answer_of_weight_0_that_a_record_is_there_for_is_refused(reader, record, field):
    with pytest.raises(RecordError, match=rf"{field}\[\].weight': got 0"):
        read(reader, record)


def test_the_last_answer_of_a_conversation_is_judged():
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "x"), ("user", "b"), ("assistant", "y"))
    ]
    found = read_judgement(Fields({"messages": chat, "label": False}, "f", 1))
    assert [turn.content for turn in found.prompt.turns] == ["a", "x", "b"]
    assert found.completion.turns == (Turn("assistant", "y"),) and not found.desirable
    with pytest.raises(RecordError, match=r"'messages': got .*end with the assistant's, which"):
        read_judgement(Fields({"messages": chat[:3], "label": False}, "f", 1))
    with pytest.raises(RecordError, match=r"messages\[\]\.weight"):
        unlearned = [*chat[:3], chat[3] | {"weight": 0}]
        read_judgement(Fields({"messages": unlearned, "label": False}, "f", 1))
