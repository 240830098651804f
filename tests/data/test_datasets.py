"""Every record shape gives the same prompts, conversations and preferences; losses are counted."""

import gzip
import itertools
import json
import logging
import random

import pytest

from halos_jax.data.datasets import (
    identify_prompts,
    load_conversations,
    load_preferences,
    load_prompts,
    order_prompts,
)
from halos_jax.data.fields import RecordError
from halos_jax.data.records import make_prompt_id
from halos_jax.types import Prompt, Turn


@pytest.fixture
def save(tmp_path):
    def write(records, name="data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def turn(role, content):
    return {"role": role, "content": content}


USER = (Turn("user", "q"),)
DIALOG = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "q")]
DIALOG_TURNS = tuple(Turn(**value) for value in DIALOG)


# --------------------------------------------------------------------------- prompts


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
    ],
)
def test_prompt_shapes(save, record, turns):
    [prompt] = load_prompts(save([record]))
    assert prompt.turns == turns
    assert prompt.prompt_id == make_prompt_id(turns)


def test_other_fields_become_extra_and_ids_are_kept(save):
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
    prompts = load_prompts(save([record, feedback, nested]))
    assert [prompt.prompt_id for prompt in prompts[:2]] == ["p7", "8"]
    extras = [dict(prompt.extra) for prompt in prompts]
    assert extras == [{"answer": "4", "level": 3}, {}, {"answer": "5", "source": "web"}]


def test_exact_duplicates_are_dropped_and_counted(save, caplog):
    path = save([{"prompt": "q"}, {"prompt": "r"}, {"messages": DIALOG[-1:]}, {"prompt": "r"}])
    with caplog.at_level(logging.INFO):
        prompts = load_prompts(path)
    assert [prompt.turns[0].content for prompt in prompts] == ["q", "r"]
    assert "2 prompts, 2 exact duplicates dropped" in caplog.text


def test_one_id_with_two_contents_is_an_error(save):
    path = save([{"prompt_id": "1", "prompt": "q"}, {"prompt_id": "1", "prompt": "r"}])
    with pytest.raises(RecordError, match=r"data.jsonl line 2: field 'prompt_id': got '1'"):
        load_prompts(path)


def test_limit_and_split(save):
    records = [{"prompt": str(i), "split": "train" if i % 2 else "test"} for i in range(10)]
    path = save(records)
    assert len(load_prompts(path)) == 10
    assert [p.turns[0].content for p in load_prompts(path, limit=3)] == ["0", "1", "2"]
    chosen = load_prompts(path, split="train", limit=2)
    assert [p.turns[0].content for p in chosen] == ["1", "3"]
    with pytest.raises(RecordError, match="got no record whose field 'split' is 'dev'"):
        load_prompts(path, split="dev")
    with pytest.raises(RecordError, match="line 1: field 'split': got nothing"):
        load_prompts(save([{"prompt": "q"}]), split="train")


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
        ({"messages": [{"from": "human", "value": "q"}]}, "messages[0].role"),
        ({"prompt": "q", "prompt_id": ""}, "prompt_id"),
        ({"prompt": "q", "extra": "x"}, "extra"),
    ],
)
def test_bad_prompts_name_file_line_and_field(save, record, field):
    path = save([{"prompt": "fine"}, record])
    with pytest.raises(RecordError) as caught:
        load_prompts(path)
    assert f"{path} line 2: field {field!r}: got " in str(caught.value)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(RecordError, match=r"no such file; allowed: .*name@split"):
        load_prompts("missing-folder/prompts.jsonl")
    with pytest.raises(RecordError, match="no such file"):
        load_prompts("org/name")


def test_a_data_set_gives_what_its_file_gives(save, tmp_path, monkeypatch):
    """`datasets` reads a local folder as it reads the hub, and adds null for absent fields."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    path = save(
        [{"prompt": DIALOG, "answer": "4"}, {"prompt": DIALOG[-1:], "prompt_id": "p"}],
        "set/train.jsonl",
    )
    folder = str(tmp_path / "set")
    assert load_prompts(f"{folder}@train") == load_prompts(path)
    assert load_prompts(f"{folder}:default@train") == load_prompts(path)
    with pytest.raises(RecordError, match=r"set@nosplit: cannot load the data set: .*allowed"):
        load_prompts(f"{folder}@nosplit")


def test_values_that_json_cannot_hold_do_not_travel(monkeypatch):
    import datasets

    rows = [{"prompt": "q", "image": object(), "score": float("nan"), "tags": ["a", {"b": 1.5}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    [prompt] = load_prompts("org/name@train")
    assert prompt.extra == {"tags": ["a", {"b": 1.5}]}


# --------------------------------------------------------------------------- conversations


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
        (pairwise(1), (USER, "good")),
        (pairwise(0.0), (USER, "bad")),
        (
            {
                "type": "binary_feedback",
                "prompt": "q",
                "output": [turn("assistant", "a")],
                "label": 1,
            },
            (USER, "a"),
        ),
        ({"type": "sample", "prompt": "q", "output": "a", "sample_id": 0}, (USER, "a")),
    ],
)
def test_conversation_shapes(save, record, expected):
    [(prompt, target)] = load_conversations(save([record]))
    assert (prompt.turns, target) == expected


def test_feedback_gives_each_preferred_output_once(save, caplog):
    binary = {"type": "binary_feedback", "prompt": "q", "output": [turn("assistant", "no")]}
    records = [pairwise(1), pairwise(1, b="other"), pairwise(0, a="good", b="best")]
    path = save([*records, binary | {"label": 0}])
    with caplog.at_level(logging.INFO):
        targets = [target for _, target in load_conversations(path)]
    assert targets == ["good", "best"]
    assert "left out: 1 repeated, 1 undesirable" in caplog.text


def test_repeated_demonstrations_are_kept(save):
    assert len(load_conversations(save([{"prompt": "q", "completion": "a"}] * 3))) == 3
    assert len(load_conversations(save([{"prompt": "q", "completion": "a"}] * 3), limit=2)) == 2


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q"}, "completion"),
        ({"prompt": "q", "completion": 3}, "completion"),
        ({"prompt": "q", "completion": [turn("user", "a")]}, "completion"),
        ({"messages": DIALOG}, "messages"),
        ({"messages": [turn("assistant", "a")]}, "messages"),
        (pairwise("yes"), "label"),
        ({"type": "binary_feedback", "prompt": "q", "output": "a"}, "label"),
    ],
)
def test_bad_conversations_are_errors(save, record, field):
    with pytest.raises(RecordError) as caught:
        load_conversations(save([record]))
    assert f"line 1: field {field!r}: got " in str(caught.value)


def test_no_conversation_left_is_an_error(save):
    undesirable = {"type": "binary_feedback", "prompt": "q", "output": "a", "label": 0}
    with pytest.raises(RecordError, match="nothing to train on"):
        load_conversations(save([undesirable]))


# --------------------------------------------------------------------------- preferences


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
def test_preference_shapes(save, record, turns):
    [preference] = load_preferences(save([record | {"source": "x"}]))
    assert preference.prompt.turns == turns
    assert preference.chosen.turns == (Turn("assistant", "good"),)
    assert preference.rejected.turns == (Turn("assistant", "bad"),)
    assert preference.prompt.prompt_id == make_prompt_id(turns)
    assert preference.prompt.extra == {"source": "x"}


def test_tokens_and_rewards_come_along(save, tmp_path):
    record = pairwise(0, reward_A=1, reward_B=2, ids_A=[1], ids_B=[2, 3], prompt_ids=[9])
    path = tmp_path / "x.json"
    path.write_bytes(gzip.compress(json.dumps([record]).encode()))
    [preference] = load_preferences(str(path))
    assert preference.prompt_ids == (9,)
    assert preference.chosen.ids == (2, 3) and preference.chosen.reward == 2.0
    assert preference.rejected.ids == (1,) and preference.rejected.reward == 1.0


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected"),
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
def test_bad_preferences_are_errors(save, record, field):
    with pytest.raises(RecordError) as caught:
        load_preferences(save([record]))
    assert f"line 1: field {field!r}: got " in str(caught.value)


# --------------------------------------------------------------------------- order


def test_the_order_depends_on_the_seed_and_not_on_the_file():
    prompts = [Prompt(f"p{i}", USER) for i in range(200)]
    ordered = order_prompts(prompts, seed=1)
    shuffled = list(prompts)
    random.Random(0).shuffle(shuffled)
    assert order_prompts(shuffled, seed=1) == ordered
    assert order_prompts(prompts, seed=2) != ordered
    assert sorted(ordered, key=lambda p: p.prompt_id) == sorted(prompts, key=lambda p: p.prompt_id)
    # Adding prompts keeps the others' order: a longer file does not reshuffle a run.
    more = order_prompts([*prompts, Prompt("new", USER)], seed=1)
    assert [p for p in more if p.prompt_id != "new"] == ordered
    # It is a shuffle: about half of all neighbours stand in the file's order (100 +- 7).
    numbers = [int(p.prompt_id[1:]) for p in ordered]
    rising = sum(a < b for a, b in itertools.pairwise(numbers))
    assert 65 < rising < 135


def test_prompts_are_identified_by_ids_turns_and_order():
    prompts = [Prompt("a", USER), Prompt("b", USER)]
    known = identify_prompts(prompts)
    assert identify_prompts([Prompt("a", USER, {"level": 3}), Prompt("b", USER)]) == known
    others = [
        prompts[::-1],
        prompts[:1],
        [Prompt("a", USER), Prompt("c", USER)],
        [Prompt("a", USER), Prompt("b", (Turn("user", "another question"),))],
    ]
    assert len({known, *map(identify_prompts, others), identify_prompts([])}) == 6
