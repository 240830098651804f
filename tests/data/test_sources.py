"""Records from files and data sets: the same ones, all of them, and errors that say what to do."""

import json
import logging

import pytest

from halos_jax.data import hub
from halos_jax.data.fields import RecordError
from halos_jax.data.sources import find_benchmarks, read_sources


@pytest.fixture
def save(tmp_path):
    def write(records, name="data.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    return write


def read(source, split=""):
    return [dict(fields.record) for fields in read_sources(source, split)]


ROWS = [{"prompt": str(i), "split": "train" if i % 2 else "test"} for i in range(4)]


def test_a_split_is_chosen_by_the_field(save):
    path = save(ROWS)
    assert read(path) == ROWS
    assert read(path, "train") == ROWS[1::2]
    with pytest.raises(RecordError, match="got no record whose field 'split' is 'dev'"):
        read(path, "dev")
    with pytest.raises(RecordError, match="line 1: field 'split': got nothing"):
        read(save([{"prompt": "q"}]), "train")


def test_several_sources_follow_each_other_and_errors_name_theirs(save):
    first, second = save(ROWS[:3], "a.jsonl"), save(ROWS[3:], "b, c.jsonl")
    assert read(second) == ROWS[3:], "a comma may be part of a name"
    second = save(ROWS[3:], "b.jsonl")
    assert read(f"{first}, {second}") == ROWS
    last = list(read_sources(f"{first},{second}"))[-1]
    assert (last.file, last.line) == (second, 1)
    with pytest.raises(RecordError, match=r"b.jsonl: got no record whose field 'split' is 'test'"):
        read(f"{first},{second}", "test")


def test_sources_that_do_not_exist():
    with pytest.raises(RecordError, match=r"no such file; allowed: .*name@split"):
        read("missing-folder/prompts.jsonl")
    with pytest.raises(RecordError, match="no such file"):
        read("org/name")


def test_a_data_set_gives_what_its_file_gives(save, tmp_path, monkeypatch):
    """`datasets` reads a local folder as it reads the hub, and adds null for absent fields."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    turns = [{"role": "user", "content": "q"}]
    rows = [{"prompt": turns, "answer": "4"}, {"prompt": turns, "prompt_id": "p"}]
    path = save(rows, "set/train.jsonl")
    folder = str(tmp_path / "set")
    for source in (f"{folder}@train", f"{folder}:default@train"):
        found = read(source)
        assert [{k: v for k, v in row.items() if v is not None} for row in found] == read(path)
    with pytest.raises(RecordError, match=r"set@nosplit: cannot load the data set: .*allowed"):
        read(f"{folder}@nosplit")


@pytest.fixture
def offer(monkeypatch):
    """Let `datasets.load_dataset` return rows; yield the arguments it is called with."""
    import datasets

    calls = []

    def put(rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda **args: calls.append(args) or rows)
        return calls

    return put


def test_a_named_data_set_is_read_by_its_function_and_counts_what_it_leaves_out(offer, caplog):
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "score_A": 4, "score_B": 1}
    row |= {"labels": 1, "post_id": "p", "score_ratio": 4.0}
    calls = offer([row, row | {"score_ratio": 1.5}])
    with caplog.at_level(logging.INFO):
        found = list(read_sources("shp@train"))
    assert calls == [{"path": "stanfordnlp/SHP", "split": "train"}]
    assert [fields.record["reward_A"] for fields in found] == [4.0]
    assert (found[0].file, found[0].line) == ("shp@train", 1)
    assert "shp@train: 1 records, 1 rows left out" in caplog.text


def test_other_splits_and_rows_of_named_data_sets_are_errors(offer):
    calls = offer([{"question": "q"}])
    with pytest.raises(RecordError, match=r"got split 'test', allowed: 's1k_11@train'"):
        read("s1k_11@test")
    with pytest.raises(RecordError, match=r"alpacaeval: got split '', allowed: 'alpacaeval@test'"):
        read("alpacaeval")
    assert not calls, "nothing is downloaded for a split that there is not"
    with pytest.raises(RecordError, match=r"rows are not as read_s1k_11 expects them \(KeyError"):
        read("s1k_11@train")


def test_benchmarks_are_known():
    assert find_benchmarks("alpacaeval@test, x.jsonl,wildbench@test,shp@test") == [
        "alpacaeval",
        "wildbench",
    ]
    assert set(find_benchmarks(",".join(f"{name}@x" for name in hub.HUB_SETS))) == {
        "alpacaeval",
        "wildbench",
    }
