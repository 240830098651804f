"""Records from files and data sets: the same ones, all of them, and errors that say what to do."""

import gzip
import json
import logging
import lzma

import pytest

from halos_jax.data.records import hub
from halos_jax.data.records.fields import Edits, RecordError
from halos_jax.data.records.sources import (
    find_benchmarks,
    find_folder,
    is_taken,
    may_read,
    read_sources,
)


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


def test_a_folder_is_its_files_by_name(save, tmp_path, caplog):
    (tmp_path / "set" / "deep").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("no records")
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    (tmp_path / "set" / ".hidden.jsonl").write_text("no records")
    save(ROWS[:1], "set/b.jsonl")
    save(ROWS[1:2], "set/a.json")
    save(ROWS[2:], "set/deep/c.jsonl")
    with caplog.at_level(logging.INFO):
        found = list(read_sources(str(tmp_path / "set")))
    assert [dict(one.record) for one in found] == [ROWS[1], ROWS[0], *ROWS[2:]]
    assert [one.place.rpartition("set/")[2] for one in found] == [
        *("a.json line 1", "b.jsonl line 1", "deep/c.jsonl line 1", "deep/c.jsonl line 2")
    ]
    assert "3 files: a.json, b.jsonl, c.jsonl" in caplog.text
    shown = "other files are not read: .hidden.jsonl, README.md, dataset_info.json"
    assert shown in caplog.text
    (tmp_path / "none").mkdir()
    with pytest.raises(RecordError, match=r"none: got a folder without a file of records, allowed"):
        read(str(tmp_path / "none"))


def test_a_folder_of_several_splits_wants_one_named(save, tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)
    save(ROWS[:1], "set/train-00000-of-00002.jsonl")
    save(ROWS[1:2], "set/train-00001-of-00002.jsonl")
    save(ROWS[2:], "set/test/x.jsonl")
    folder = str(tmp_path / "set")
    with pytest.raises(
        RecordError, match=f"splits test, train, allowed: {folder}@test, {folder}@tr"
    ):
        read(folder)
    assert read(f"{folder}@train") == ROWS[:2] and read(f"{folder}@test") == ROWS[2:]
    assert read(f"{folder}/train*.jsonl") == ROWS[:2]
    assert read(f"{folder}/**/*.jsonl") == [*ROWS[2:], *ROWS[:2]]
    with pytest.raises(RecordError, match="no file matches this pattern"):
        read(f"{folder}/*.parquet")


def test_a_file_beside_its_compressed_copy_is_refused_by_name(save, tmp_path, caplog):
    (tmp_path / "set").mkdir()
    save(ROWS, "set/x.jsonl")
    data = (tmp_path / "set" / "x.jsonl").read_bytes()
    for suffix, pack in (("gz", gzip.compress), ("XZ", lzma.compress)):
        copy = tmp_path / "set" / f"x.jsonl.{suffix}"
        copy.write_bytes(pack(data))
        for source in (f"{tmp_path}/set", f"{tmp_path}/set/*"):
            with pytest.raises(
                RecordError, match=r"got '.*x\.jsonl' and '.*x\.jsonl\..*, which are"
            ):
                read(source)
        assert read(f"{tmp_path}/set/*.jsonl") == read(str(copy)) == ROWS
        copy.unlink()
    save(ROWS[:1], "set/y.json")
    assert read(f"{tmp_path}/set") == ROWS + ROWS[:1] and "differ" not in caplog.text
    save(ROWS[:1], "set/x.json")
    assert read(f"{tmp_path}/set") == ROWS[:1] + ROWS + ROWS[:1]
    assert "'x.json' and 'x.jsonl' differ in their format alone; both are read" in caplog.text


def test_tables_give_the_records_of_their_rows(save, tmp_path):
    import datasets

    rows = [{"prompt": "a", "n": "1"}, {"prompt": "b", "n": "2"}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "x.parquet"))
    table.to_parquet(str(tmp_path / "named.jsonl"))
    table.to_csv(str(tmp_path / "x.csv"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "dict"))
    for name in ("x.parquet", "named.jsonl", "x.csv", "saved", "dict@train"):
        assert read(str(tmp_path / name)) == rows, name
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    assert read(str(arrow)) == rows
    assert read(f"{tmp_path}/x.csv,{tmp_path}/x.parquet") == rows * 2
    last = list(read_sources(str(tmp_path / "x.parquet")))[-1]
    assert last.place == f"{tmp_path}/x.parquet row 2"
    assert next(read_sources(str(tmp_path / "x.csv"))).texts


def test_records_are_changed_and_left_out(save, caplog):
    path = save(ROWS)
    edits = Edits(change=lambda record: None if record["prompt"] == "1" else {**record, "x": 1})
    with caplog.at_level(logging.INFO):
        found = [dict(one.record) for one in read_sources(path, "train", edits)]
    assert found == [{**ROWS[3], "x": 1}]
    assert f"{path}: data.map leaves out 1 of 2 records" in caplog.text


def test_bad_records_go_to_who_asks_for_them(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"split": "a"}\n{"split": 3}\n{"split": NaN}\n[]\n{"split": "a", "n": 1}\n')

    def change(record):
        if "n" in record:
            raise RecordError("no n")
        return record

    errors = []
    found = list(read_sources(str(path), "a", Edits(change=change), on_bad=errors.append))
    assert [one.line for one in found] == [1]
    shown = [str(error).removeprefix(f"{path} line ") for error in errors]
    assert [one[:3] for one in shown] == ["2: ", "3: ", "4: ", "5: "]


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


def test_links_in_a_circle_repeat_no_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "to").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    assert len(list(read_sources(str(tmp_path / "a")))) == 1


def test_which_files_of_a_folder_count(tmp_path):
    folder = str(tmp_path)
    assert [find_folder(name) for name in (folder, f"{folder}@train", "a/b@train", "a")] == [
        folder,
        folder,
        "",
        "",
    ]
    names = ("x.jsonl", "sub/train.csv", ".x.jsonl", "notes.md", "dataset_info.json")
    assert [may_read(folder, name) for name in names] == [True, True, False, False, False]
    assert [is_taken(folder, name) for name in names] == [True, True, False, False, False]
    assert [is_taken(f"{folder}@train", name) for name in names[:2]] == [False, True]
    for name in ("dataset_info.json", "state.json"):  # of a saved data set, which says it itself
        (tmp_path / name).write_text("{}")
    assert may_read(folder, "state.json") and not is_taken(folder, "x.jsonl")
