"""Every spelling of a prompt gives the same turns; what the config adds, and what rewards see."""

import json

import pytest

from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.formats import make_prompt_id, sample_to_record, write_records
from halos_jax.data.records.questions import read_prompt
from halos_jax.data.records.reading import read_records
from halos_jax.data.records.shapes import (
    read_demonstration,
    read_judgement,
    read_preference,
    read_scored,
)
from halos_jax.types import Sample, Turn


def read(reader, record, edits=None, **options):
    return reader(Fields(record, "data.jsonl", 2, edits or Edits()), **options)


def turn(role, content):
    return {"role": role, "content": content}


def make(*turns):
    return tuple(Turn(*one.split(":")) for one in turns)


USER = (Turn("user", "q"),)
DIALOG = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "q")]
DIALOG_TURNS = tuple(Turn(**value) for value in DIALOG)


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
    first = {"prompt_id": "p7", "answer": "4", "level": 3, "split": "x"}
    last = {"answer": "5", "source": "web", "extra": {"answer": "5"}}
    assert extras == [first, {}, last]


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
        ({"type": "sample", "prompt": "q", "extra": "x"}, "extra"),
        ({"chosen": "Human: q Assistant: a", "rejected": "b"}, "chosen"),
    ],
)
def test_bad_prompts_name_file_line_and_field(record, field):
    with pytest.raises(RecordError) as caught:
        read(read_prompt, record)
    assert str(caught.value).startswith(f"data.jsonl line 2: field {field!r}: got ")


# --------------------------------------------------------------------------- what rewards see

EVERY = {"label": "1", "output": "2", "input": "", "type": "math", "dataset": "d", "split": "s"}
EVERY |= {"generator": "g", "reward": 3, "chosen": "c", "rejected": "r", "extra": {"x": 1}}
EVERY |= {"sample_id": "z", "finish_reason": "?", "answer": 4, "prompt_id": "p"}


def test_a_reward_sees_every_field_but_the_prompt(tmp_path):
    prompt = read(read_prompt, {"prompt": "q", **EVERY})
    assert prompt.extra == {**EVERY, "x": 1}
    sample = Sample(prompt, 0, "out", (1,), (2,), "stop", reward=0.5)
    write_records(tmp_path / "samples.jsonl", [sample_to_record(sample)])
    [(line, record)] = read_records(tmp_path / "samples.jsonl")
    again = read_scored(Fields(record, "samples.jsonl", line))
    assert again == sample and again.prompt.extra == prompt.extra
    assert read(read_prompt, record).extra == prompt.extra


def test_of_somebody_elses_samples_too():
    record = {"prompt": "q", "prompt_id": "p", "sample_id": 0, "output": "o", "label": "4"}
    found = read(read_scored, record | {"dataset": "d", "instruction": "i"})
    assert found.prompt.extra == {"label": "4", "dataset": "d", "instruction": "i"}
    old = record | {"type": "sample", "extra": {"answer": "4"}}
    assert read(read_scored, old).prompt.extra == {"answer": "4", "label": "4"}


def test_the_rest_of_a_conversation_is_seen_too():
    messages = [turn("user", "q"), turn("assistant", "a")]
    assert read(read_prompt, {"messages": messages, "n": 1}).extra == {"messages": messages, "n": 1}
    assert read(read_prompt, {"messages": messages[:1], "n": 1}).extra == {"n": 1}


# --------------------------------------------------------------------------- what the config adds


def test_names_of_fields_are_mapped():
    edits = Edits({"prompt": "task", "completion": "meta.gold"})
    record = {"task": "q", "prompt": "other", "meta": {"gold": "a"}}
    fields = Fields(record, "f", 1, edits)
    found = read_demonstration(fields)
    assert (found.prompt.turns, found.completion.turns) == (USER, (Turn("assistant", "a"),))
    assert fields.unread() == {"prompt"}
    assert read(read_prompt, record, edits).extra == {"prompt": "other", "meta": {"gold": "a"}}
    with pytest.raises(RecordError, match=r"line 2: field 'meta\.gold': got 3, allowed"):
        read(read_demonstration, {"task": "q", "meta": {"gold": 3}}, edits)


def test_a_template_makes_the_prompt_and_hides_no_field():
    edits = Edits(template=(("Solve ", "question"),), system="s")
    record = {"question": "1+1", "answer": "2", "prompt": "p"}
    expected = make("system:s", "user:Solve 1+1")
    prompt = read(read_prompt, record, edits)
    assert (prompt.turns, prompt.extra) == (expected, record)
    assert prompt.prompt_id == make_prompt_id(expected)
    found = read(read_demonstration, record, edits)
    assert found.prompt.turns == expected and found.completion.turns == make("assistant:2")
    pair = read(read_preference, {"question": "1+1", "chosen": "2", "rejected": "3"}, edits)
    assert pair.prompt.turns == expected and pair.chosen.turns == make("assistant:2")
    with pytest.raises(RecordError, match=r"field 'completion': got nothing.*prompt_template"):
        read(read_demonstration, {"question": "1", "messages": DIALOG}, edits)


def test_token_ids_do_not_go_with_another_prompt():
    sample = {"type": "sample", "prompt": "q", "output": "a", "prompt_id": "p", "sample_id": 0}
    sample |= {"prompt_ids": [1], "response_ids": [2], "reward": 1.0}
    for reader in (read_scored, read_demonstration):
        assert read(reader, sample).prompt_ids == (1,)
        with pytest.raises(RecordError, match=r"field 'prompt_ids': got \[1\].*leave the ids"):
            read(reader, sample, Edits(system="s"))


def test_joined_turns_are_joined_everywhere():
    chat = [turn("system", "s"), turn("user", "q"), turn("user", "r"), turn("assistant", "a")]
    merged = make("user:s\n\nq\n\nr")
    edits = Edits(merge=True)
    assert read(read_prompt, {"messages": chat}, edits).turns == merged
    assert read(read_demonstration, {"messages": chat}, edits).prompt.turns == merged
    pair = {"chosen": chat, "rejected": [*chat[:-1], turn("assistant", "b")]}
    found = read(read_preference, pair, edits)
    assert found.prompt.turns == merged and found.rejected.turns == make("assistant:b")
    twice = {"prompt": "q", "completion": [turn("assistant", "a"), turn("assistant", "b")]}
    assert read(read_demonstration, twice, edits).completion.turns == make("assistant:a\n\nb")
    assert read(read_prompt, {"prompt": "q", "system": "s"}, edits).turns == make("user:s\n\nq")


def test_texts_of_csv_are_parsed_where_numbers_and_lists_are_meant():
    def csv(record):
        return Fields(record, "f.csv", 2, texts=True)

    messages = json.dumps([turn("user", "q"), turn("assistant", "a")])
    assert read_demonstration(csv({"messages": messages})).prompt.turns == USER
    found = read_judgement(csv({"prompt": "7", "completion": "8", "label": "True"}))
    assert found.desirable and found.prompt.turns == make("user:7")
    assert not read_judgement(csv({"prompt": "7", "completion": "8", "label": "0"})).desirable
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1.5"}
    assert read_preference(csv(pair)).chosen.reward == 1.5
    with pytest.raises(RecordError, match="field 'margin': got 'big', allowed: a finite number"):
        read_preference(csv(pair | {"margin": "big"}))


def test_values_that_json_cannot_hold_do_not_travel():
    tags = ["a", {"b": 1.5}]
    record = {"prompt": "q", "image": object(), "score": float("nan"), "tags": tags}
    fields = Fields(record)
    assert read_prompt(fields).extra == {"tags": tags}
    assert fields.unread() == {"image (no JSON value)", "score (no JSON value)"}


def test_one_turn_in_the_text_of_a_table_stays_what_it_is():
    named = {"role": "user", "name": "bob", "content": "q"}
    found = read_prompt(Fields({"prompt": json.dumps([named])}, texts=True))
    assert found.turns == (Turn("user", "q", further='{"name":"bob"}'),)
    with pytest.raises(RecordError, match="turns that end with the user's"):
        read_prompt(Fields({"prompt": json.dumps([turn("assistant", "a")])}, texts=True))


def test_tools_of_a_record_and_of_its_turns_must_agree():
    asked = turn("user", "q") | {"tools": [{"name": "f"}]}
    assert read(read_prompt, {"prompt": [asked], "tools": asked["tools"]}).turns[0].further
    with pytest.raises(RecordError, match=r"'tools': got \[\{'name': 'g'\}\]"):
        read(read_prompt, {"prompt": [asked], "tools": [{"name": "g"}]})


def test_what_is_ignored_is_not_read():
    record = {"instruction": "a", "input": "b", "history": [["c", "d"]], "system": "e"}
    edits = Edits(ignored=frozenset({"input", "history", "system"}))
    assert read(read_prompt, record, edits).turns == make("user:a")


def test_answers_without_a_question_are_no_pair():
    record = {"chosen": "Human: a Assistant: x", "rejected": "Human: a Assistant: y"}
    with pytest.raises(RecordError, match=r"got \[\], .*before the answer; or one of prompt"):
        read_preference(Fields(record, "f", 1))
