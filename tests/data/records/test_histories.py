"""What stands before answers: found in each form, and said where two of them differ."""

import pytest

from halos_jax.data.records.fields import Fields, RecordError
from halos_jax.data.records.histories import read_history, split_pair, strip_prompt
from halos_jax.data.records.turns import find_context
from halos_jax.types import Turn


def fields_of(**record):
    return Fields(record, "f", 3)


def say(*turns):
    return [dict(zip(("role", "content"), turn.split(":"))) for turn in turns]


def make(*turns):
    return tuple(Turn(*turn.split(":")) for turn in turns)


def test_a_history_is_pairs_or_turns():
    expected = make("user:a", "assistant:b", "user:c", "assistant:d")
    assert read_history(fields_of(history=[["a", "b"], ["c", "d"]])) == expected
    turns = say("user:a", "assistant:b", "user:c", "assistant:d")
    assert read_history(fields_of(history=turns)) == expected
    assert read_history(fields_of(history=[])) == read_history(fields_of()) == ()
    text = fields_of(history="a text")
    assert read_history(text) == () and text.unread() == {"history"}
    for history, at in (([["a"]], "history[0]"), ([["a", 1]], "history[0][1]"), (["a"], "[0]")):
        with pytest.raises(RecordError) as caught:
            read_history(fields_of(history=history))
        assert at in str(caught.value)


def test_an_answer_may_repeat_the_prompt_and_its_system_turn():
    prompt, answer = make("user:q"), make("assistant:a")
    for chosen in ("a", say("assistant:a"), say("user:q", "assistant:a")):
        assert strip_prompt(fields_of(chosen=chosen), "chosen", prompt) == answer
    whole = say("system:s", "user:q", "assistant:a")
    assert strip_prompt(fields_of(chosen=whole, system="s"), "chosen", prompt) == answer
    assert len(strip_prompt(fields_of(chosen=whole), "chosen", prompt)) == 3


def test_pairs_share_all_but_the_last_answer():
    shared = say("user:q", "assistant:a", "user:r")
    fields = fields_of(
        chosen=[*shared, *say("assistant:b")], rejected=[*shared, *say("assistant:c")]
    )
    turns = make("user:q", "assistant:a", "user:r")
    answers = (Turn("assistant", "b"), Turn("assistant", "c"))
    assert split_pair(fields, None) == (turns, answers)
    assert split_pair(fields, turns[:1]) == (turns, answers)
    rest = fields_of(
        chosen=say("assistant:a", "user:r", "assistant:b"),
        rejected=say("assistant:a", "user:r", "assistant:c"),
    )
    assert split_pair(rest, turns[:1]) == (turns, answers)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            say("assistant:b", "user:c", "assistant:d"),
            say("assistant:x", "user:y", "assistant:z"),
            r"field 'rejected': got \"turn 2 as 'assistant: x', which in 'chosen' is "
            r"'assistant: b'\", allowed: a pair of answers to one conversation",
        ),
        (
            say("assistant:b", "user:c", "assistant:d"),
            "z",
            r"field 'rejected': got \"turn 2 as 'nothing', which in 'chosen' is 'assistant: b'",
        ),
        (say("user:other", "assistant:b"), say("user:other", "assistant:c"), "field 'chosen': got"),
        (say("assistant:b", "user:c"), "z", "field 'chosen': got"),
        ("b", say("assistant:b", "tool:c"), "field 'rejected': got"),
    ],
)
def test_where_histories_differ_is_said(chosen, rejected, message):
    with pytest.raises(RecordError, match=f"f line 3: {message}"):
        split_pair(fields_of(chosen=chosen, rejected=rejected), make("user:a"))


def test_tools_in_the_turns_of_a_pair_stay_or_are_named():
    tools = [{"name": "f"}]
    question = {"role": "user", "content": "q", "tools": tools}
    chosen = [question, *say("assistant:a")]
    fields = fields_of(chosen=chosen, rejected=[question, *say("assistant:b")])
    turns, answers = split_pair(fields, None)
    assert find_context(turns) == {"tools": tools}
    assert answers == make("assistant:a", "assistant:b")
    other = fields_of(chosen=chosen, rejected=say("user:q", "assistant:b"))
    with pytest.raises(RecordError, match=r"'rejected\[\].tools': got nothing"):
        split_pair(other, None)
    for record, accepted in (({}, False), ({"tools": tools}, True), ({"tools": [{}]}, False)):
        fields = fields_of(chosen=chosen, **record)
        if accepted:
            assert strip_prompt(fields, "chosen", make("user:q")) == make("assistant:a")
            continue
        with pytest.raises(RecordError, match=r"'chosen\[\].tools'"):
            strip_prompt(fields, "chosen", make("user:q"))
