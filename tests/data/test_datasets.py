"""What of a source is taken: duplicates and subsets, thinned classes, collapsed spaces, order."""

import itertools
import json
import logging
import random

import pytest

from halos_jax.config import ConfigError, DataConfig
from halos_jax.data.datasets import (
    choose,
    identify_prompts,
    load_demonstrations,
    load_judgements,
    load_preferences,
    load_prompts,
    load_scored,
    order_prompts,
    refuse_overlap,
    warn_of_benchmarks,
)
from halos_jax.data.records.fields import Edits, RecordError
from halos_jax.data.selection import Selection, select_eval, select_train
from halos_jax.types import Prompt, Turn


@pytest.fixture
def save(tmp_path):
    def write(records) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def turn(role, content):
    return {"role": role, "content": content}


USER = (Turn("user", "q"),)


# --------------------------------------------------------------------------- prompts


def test_exact_duplicates_are_dropped_and_counted(save, caplog):
    path = save([{"prompt": "q"}, {"prompt": "r"}, {"question": "q"}, {"prompt": "r"}])
    with caplog.at_level(logging.INFO):
        prompts = load_prompts(path)
    assert [prompt.turns[0].content for prompt in prompts] == ["q", "r"]
    assert "2 prompts, 2 exact duplicates dropped" in caplog.text


def test_one_id_with_two_contents_is_an_error(save):
    path = save([{"prompt_id": "1", "prompt": "q"}, {"prompt_id": "1", "prompt": "r"}])
    with pytest.raises(RecordError, match=r"data.jsonl line 2: field 'prompt_id': got '1'"):
        load_prompts(path)


def test_a_limit_takes_a_random_subset_in_the_files_order(save):
    path = save([{"prompt": str(i), "split": "train" if i % 2 else "test"} for i in range(100)])

    def load(**selection):
        return [int(p.turns[0].content) for p in load_prompts(path, Selection(**selection))]

    assert load() == list(range(100))
    few, more = load(limit=10, seed=3), load(limit=30, seed=3)
    assert few == sorted(few) and len(few) == 10
    assert load(limit=10, seed=3) == few != load(limit=10, seed=4)
    assert set(few) < set(more)
    assert min(few) < 50 < max(few), "a subset of all of the file, not its beginning"
    assert load(limit=200, seed=3) == list(range(100))
    odd = load(limit=5, split="train")
    assert len(odd) == 5 and all(number % 2 for number in odd)


def test_all_loaders_take_subsets(save):
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(20)]
    five = Selection(limit=5, seed=1)
    expected = [str(number) for number in choose(range(20), 5, 1)]
    path = save(pairs)
    assert [one.prompt.turns[0].content for one in load_preferences(path, five)] == expected
    assert [one.prompt.turns[0].content for one in load_demonstrations(path, five)] == expected
    assert [o.prompt.turns[0].content for o in load_judgements(path, five)][::2] == expected
    samples = [
        {"prompt": "q", "prompt_id": str(i // 4), "sample_id": i % 4, "output": "a", "reward": i}
        for i in range(80)
    ]
    scored = load_scored(save(samples), five)
    assert [one.prompt.prompt_id for one in scored] == [name for name in expected for _ in range(4)]


def test_the_config_says_what_is_taken():
    data = DataConfig(max_train=3, max_eval=4, train_split="a", eval_split="b")
    train, held_out = select_train(data, seed=7), select_eval(data)
    assert (train.limit, train.seed, train.split) == (3, 7, "a")
    assert (held_out.limit, held_out.seed, held_out.split) == (4, 0, "b")
    assert held_out == select_eval(DataConfig(max_eval=4, eval_split="b", max_prompt_count=9))
    data = DataConfig(
        max_prompt_count=2,
        frac_unique_desirable=0.5,
        frac_unique_undesirable=0.25,
        collapse_whitespace=True,
        learn_turns="last",
        learn_outputs="preferred",
    )
    both = {"collapse": True, "every_turn": False, "best_only": False}
    shares = {"per_prompt": 2, "keep_desirable": 0.5, "keep_undesirable": 0.25}
    assert select_train(data, seed=1) == Selection(seed=1, **shares, **both)
    assert select_eval(data) == Selection(**both)


def test_training_on_a_benchmark_is_warned_of(caplog):
    warn_of_benchmarks("shp@train,x.jsonl")
    assert not caplog.text
    warn_of_benchmarks("alpacaeval@test,x.jsonl")
    assert "alpacaeval is a benchmark: after training on it" in caplog.text


# --------------------------------------------------------------------------- feedback


def test_pairs_of_a_prompt_are_limited(save):
    path = save(
        {"prompt": f"q{i % 3}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)
    )
    pairs = load_preferences(path, Selection(per_prompt=4, seed=1))
    by_prompt = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt.prompt_id, []).append(pair)
    assert [len(found) for found in by_prompt.values()] == [4, 4, 4]
    every = load_preferences(path)
    assert [pair for pair in every if pair in pairs] == pairs
    assert load_preferences(path, Selection(per_prompt=4, seed=2)) != pairs
    assert load_preferences(path, Selection(per_prompt=10)) == every
    assert len(load_judgements(path, Selection(per_prompt=4))) == 2 * 12


@pytest.mark.parametrize(
    ("desirable", "undesirable", "counts"), [(0.5, 1.0, (5, 10)), (1.0, 0.0, (10, 0))]
)
def test_a_share_of_a_class_can_be_kept(save, desirable, undesirable, counts):
    path = save({"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(10))
    selection = Selection(keep_desirable=desirable, keep_undesirable=undesirable, seed=1)
    found = load_judgements(path, selection)
    assert tuple(sum(one.desirable is kind for one in found) for kind in (True, False)) == counts
    assert load_judgements(path, selection) == found
    every = load_judgements(path)
    assert [one for one in every if one in found] == found


def test_demonstrations_are_kept_as_often_as_they_come(save):
    path = save([{"prompt": "q", "completion": "a"}] * 3)
    assert [one.completion.turns[0].content for one in load_demonstrations(path)] == ["a"] * 3


def test_feedback_of_every_kind_gives_a_demonstration_a_prompt(save, caplog):
    pair = {"prompt": "p", "output_A": "worse", "output_B": "better", "label": 0}
    binary = {"type": "binary_feedback", "prompt": "b"}
    scored = {"type": "scalar_feedback", "prompt": "s"}
    path = save(
        [
            {"prompt": "d", "completion": "demonstrated"},
            pair,
            binary | {"output": "bad", "label": 0},
            binary | {"output": "good", "label": 1},
            scored | {"output": "lower", "reward": 1},
            scored | {"output": "higher", "reward": 2, "response_ids": [5], "prompt_ids": [4]},
        ]
    )
    with caplog.at_level(logging.INFO):
        found = load_demonstrations(path)
    outputs = [one.completion.turns[0].content for one in found]
    assert outputs == ["demonstrated", "better", "good", "higher"]
    assert found[-1].prompt_ids == (4,) and found[-1].completion.ids == (5,)
    assert "4 demonstrations; 3 outputs of feedback left out" in caplog.text


def test_prompts_of_one_id_are_told_apart(save):
    """As in several files whose ids were counted from 0 in each."""
    prompts = [{"prompt_id": 0, "prompt": f"q{i}"} for i in range(2)]
    pairs = [one | {"output_A": "yes", "output_B": "no", "label": 1} for one in prompts]
    scores = [
        one | {"type": "scalar_feedback", "output": "yes", "reward": i, "sample_id": 0}
        for i, one in enumerate(prompts)
    ]

    def show(found):
        return [one.prompt.turns[0].content for one in found]

    assert show(load_demonstrations(save(pairs))) == ["q0", "q1"]
    assert show(load_preferences(save(pairs), Selection(per_prompt=1))) == ["q0", "q1"]
    assert show(load_judgements(save(pairs))) == ["q0", "q0", "q1", "q1"]
    assert len(load_judgements(save(pairs), Selection(keep_desirable=0.5))) == 3
    assert show(load_demonstrations(save(scores))) == ["q0", "q1"]
    assert len(load_scored(save(scores), Selection(limit=1))) == 1


def test_groups_say_what_they_are_made_of(save):
    with pytest.raises(RecordError, match=r"line 1: .* allowed: HALOs' scalar_feedback"):
        load_scored(save([{"prompt": "q", "completion": "a", "reward": 1.0}]))


def test_nothing_left_is_an_error(save):
    undesirable = {"type": "binary_feedback", "prompt": "q", "output": "a", "label": 0}
    with pytest.raises(RecordError, match="nothing to train on"):
        load_demonstrations(save([undesirable]))
    with pytest.raises(RecordError, match="nothing to train on"):
        load_judgements(save([undesirable]), Selection(keep_undesirable=0.0))


def test_spaces_collapse_where_asked_for(save):
    text, expected = "a  b\t\tc\n    d", "a b c\n d"
    turns = [turn("user", text), turn("assistant", text)]
    path = save([{"prompt": text, "chosen": text, "rejected": "x\t"}, {"messages": turns}])
    collapse = Selection(collapse=True)
    prompts = load_prompts(path, collapse)
    assert [one.turns[0].content for one in prompts] == [expected]
    assert [one.turns[0].content for one in load_prompts(path)] == [text]
    for one in load_demonstrations(path, collapse):
        assert one.prompt.turns[0].content == one.completion.turns[0].content == expected
    pairs = save([{"prompt": text, "chosen": text, "rejected": "x\t"}])
    [pair] = load_preferences(pairs, collapse)
    assert pair.chosen.turns[0].content == expected and pair.rejected.turns[0].content == "x "
    assert [o.completion.turns[0].content for o in load_judgements(pairs, collapse)][1] == "x "


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


def test_a_prompt_that_is_held_out_and_trained_on_is_refused():
    one, two, three = (Prompt(name, (Turn("user", name),)) for name in "abc")
    refuse_overlap([one, two], [three])
    with pytest.raises(ConfigError, match=r"data\.eval: 2 of its prompts .*\(the first is a\)"):
        refuse_overlap([two, one, three], [one, two])


def test_a_conversation_under_another_id_is_refused_in_a_test_and_said_of_data_eval(caplog):
    one, two = (Prompt(name, (Turn("user", name),)) for name in "ab")
    twin, other = Prompt("t", one.turns), Prompt("a", (Turn("user", "other"),))
    with pytest.raises(ConfigError, match=r"data\.test: 1 of its prompts .*\(the first is t\)"):
        refuse_overlap([one, two], [twin], field="data.test")
    with pytest.raises(ConfigError, match=r"data\.test: 2 of its prompts .*\(the first is t\)"):
        refuse_overlap([one, two], [twin, other], field="data.test")
    placed = [
        Prompt("a", other.turns, place="t.jsonl:3"),
        Prompt("b", two.turns, place="t.jsonl:9"),
    ]
    for field in ("data.test", "data.eval"):
        with pytest.raises(ConfigError, match=rf"{field}: 2 of .*\(the first is t\.jsonl:3\)"):
            refuse_overlap([one, two], placed, field=field)
    assert not caplog.messages
    refuse_overlap([one, two], [twin])
    [line] = caplog.messages
    assert line.startswith("data.eval: 1 of its prompts are in data.train too, under other ids")


# --------------------------------------------------------------------------- what is not used


def test_unread_fields_are_said_once_where_nobody_can_see_them(save, caplog):
    path = save([{"prompt": f"q{i}", "completion": "a", "meta": i or None} for i in range(4)])
    load_demonstrations(path)
    [line] = [one for one in caplog.messages if "not read" in one]
    assert "4 records; fields that are not read, and in how many: meta (3);" in line
    caplog.clear()
    load_prompts(path)  # a reward function sees them
    load_demonstrations(path, Selection(edits=Edits(ignored=frozenset({"meta"}))))
    assert "not read" not in caplog.text


def test_bad_records_are_left_out_where_asked_for(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    good = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "chosen": "c"}]
    lines = [*map(json.dumps, good), "{", '{"prompt": NaN}', json.dumps({**good[0], "prompt": "s"})]
    path.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=r"x\.jsonl line 2: field 'rejected'"):
        load_preferences(str(path))
    found = load_preferences(str(path), Selection(edits=Edits(skip=True)))
    assert [one.prompt.turns[0].content for one in found] == ["q", "s"]
    assert "3 bad records are left out (data.skip_bad), 2 are read; the first: " in caplog.text


def test_pairs_without_a_margin_are_refused_where_one_is_wanted(save):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = save([pair | {"margin": 2}, pair])
    assert [one.chosen.reward for one in load_preferences(path)] == [2.0, None]
    with pytest.raises(RecordError, match=r"data\.jsonl line 2: field 'margin': got nothing"):
        load_preferences(path, Selection(margins=True))


def test_duplicates_with_other_fields_are_said(save, caplog):
    prompts = load_prompts(save([{"prompt": "q", "answer": 1}, {"prompt": "q", "answer": 2}]))
    assert [one.extra for one in prompts] == [{"answer": 1}]
    assert "1 of the duplicates have other fields than the first record" in caplog.text


def test_what_the_config_adds_holds_for_both_sets():
    data = DataConfig(system_prompt="s", fields="prompt=x", skip_bad=True)
    expected = Edits(names={"prompt": "x"}, system="s", skip=True)
    assert select_train(data, 0).edits == select_eval(data).edits == expected


def test_weights_of_pairs_are_for_losses_on_pairs_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    outputs = {f"output_{letter}": [{"role": "assistant", "content": letter}] for letter in "AB"}
    record = {"type": "pairwise_feedback", "prompt": "q", **outputs, "label": 1, "weight": 0.5}
    path.write_text(json.dumps(record) + "\n")
    assert [pair.weight for pair in load_preferences(str(path))] == [0.5]
    for load in (load_judgements, load_demonstrations):
        with pytest.raises(RecordError, match=r"field 'weight': got 0\.5, allowed: nothing"):
            load(str(path))
