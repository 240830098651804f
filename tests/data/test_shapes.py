"""Every record shape gives the same prompts, demonstrations and preferences; bad ones are named."""

import re

import pytest

from halos_jax.data.fields import Fields, RecordError
from halos_jax.data.records import make_prompt_id
from halos_jax.data.shapes import (
    is_feedback,
    read_demonstration,
    read_judgement,
    read_preference,
    read_prompt,
)
from halos_jax.types import Turn


def read(reader, record, **options):
    return reader(Fields(record, "data.jsonl", 2), **options)


def turn(role, content):
    return {"role": role, "content": content}


USER = (Turn("user", "q"),)
DIALOG = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "q")]
DIALOG_TURNS = tuple(Turn(**value) for value in DIALOG)


def pairwise(label, a="good", b="bad", **more):
    outputs = {"output_A": [turn("assistant", a)], "output_B": [turn("assistant", b)]}
    return {"type": "pairwise_feedback", "prompt": "q", "label": label, **outputs, **more}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "q"}, USER),
        ({"prompt": [turn("user", "q")]}, USER),
        ({"prompt": DIALOG}, DIALOG_TURNS),
        ({"instruction": "q"}, USER),
        ({"instruction": "q", "input": ""}, USER),
        ({"instruction": "q", "input": "x"}, (Turn("user", "q\n\nx"),)),
        ({"question": "q", "answer": "4"}, USER),
        ({"messages": [*DIALOG, turn("assistant", "z")]}, DIALOG_TURNS),
        ({"messages": DIALOG}, DIALOG_TURNS),
        ({"prompt": None, "instruction": "q"}, USER),
        ({"prompt": "q", "messages": DIALOG}, USER),
        ({"chosen": [*DIALOG, turn("assistant", "z")], "rejected": "y"}, DIALOG_TURNS),
    ],
)
def test_prompt_shapes(record, turns):
    prompt = read(read_prompt, record)
    assert prompt.turns == turns
    assert prompt.prompt_id == make_prompt_id(turns)


def test_other_fields_become_extra_and_ids_are_kept():
    record = {
        "prompt_id": "p7",
        "prompt": "q",
        "answer": "4",
        "level": 3,
        "split": "x",
        "none": None,
    }
    feedback = {
        "type": "pairwise_feedback",
        "prompt": "r",
        "prompt_id": 8,
        "output_A": [],
        "label": 1,
    }
    nested = {"prompt": "s", "extra": {"answer": "5"}, "source": "web"}
    prompts = [read(read_prompt, one) for one in (record, feedback, nested)]
    assert [prompt.prompt_id for prompt in prompts[:2]] == ["p7", "8"]
    extras = [dict(prompt.extra) for prompt in prompts]
    assert extras == [{"answer": "4", "level": 3}, {}, {"answer": "5", "source": "web"}]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"text": "q"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [turn("user", "q"), turn("assistant", "a")]}, "prompt"),
        ({"prompt": [turn("system", "s")]}, "prompt"),
        ({"messages": [turn("assistant", "a")]}, "messages"),
        ({"messages": [{"from": "human", "content": 1}]}, "messages[0].content"),
        ({"prompt": "q", "prompt_id": ""}, "prompt_id"),
        ({"prompt": "q", "extra": "x"}, "extra"),
        ({"chosen": "Human: q Assistant: a", "rejected": "b"}, "chosen"),
    ],
)
def test_bad_prompts_name_file_line_and_field(record, field):
    with pytest.raises(RecordError) as caught:
        read(read_prompt, record)
    assert str(caught.value).startswith(f"data.jsonl line 2: field {field!r}: got ")


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
    preference = read(read_preference, record | {"source": "x"})
    assert preference.prompt.turns == turns
    assert preference.chosen.turns == (Turn("assistant", "good"),)
    assert preference.rejected.turns == (Turn("assistant", "bad"),)
    assert preference.prompt.prompt_id == make_prompt_id(turns)
    assert preference.prompt.extra == {"source": "x"}


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


def test_values_that_json_cannot_hold_do_not_travel():
    tags = ["a", {"b": 1.5}]
    record = {"prompt": "q", "image": object(), "score": float("nan"), "tags": tags}
    assert read(read_prompt, record).extra == {"tags": tags}
