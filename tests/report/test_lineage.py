"""Where a model and its data come from, by names of the hub."""

import pytest

from halos_jax.report.lineage import find_id, find_sets, name_place, trace
from tests.report.written_runs import write_config


def write(workdir, path, **fields):
    return write_config(workdir, model__path=str(path), **fields)


def read(workdir):
    return trace({"model": {"path": str(workdir)}})


def test_a_model_is_traced_through_the_runs_before(tmp_path):
    sft = write(tmp_path / "sft", "org/base")
    (sft / "final").mkdir()
    first = write(tmp_path / "first", sft / "final")
    found = read(first)
    assert (found.start, found.base, found.runs) == ("first", "org/base", ("sft", "first"))
    assert (found.start_id, found.base_id, found.is_drawn) == ("", "org/base", False)
    for place in ("rounds/0001", "rounds/0001/model"):
        assert read(first / place) == found


def test_new_weights_have_no_base(tmp_path):
    drawn = write(tmp_path / "drawn", "org/base", model__random_init=True)
    found = read(drawn)
    assert found.is_drawn and found.base_id == "" and found.base == "org/base"


def test_a_run_that_names_itself_ends(tmp_path):
    assert len(read(write(tmp_path / "loop", tmp_path / "loop")).runs) == 20


@pytest.mark.parametrize("path", ["", "/a/b", "./a", "~/a", "a/b/c", "org/a b", "x\n---"])
def test_a_path_is_no_id(path):
    assert find_id(path) == ""


def test_a_folder_that_is_there_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_id("org/name") == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_id("org/name") == "" and name_place("org/name") == "name"


def test_data_sets_of_the_hub_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    train = "shp@train, org/own:config@train,mine@train,pairs.jsonl,shp@train"
    assert find_sets({"data": {"train": train}}) == ["stanfordnlp/SHP", "org/own"]
    assert name_place("org/own:config@train") == "org/own:config@train"
    assert name_place("/home/me/DIR/") == "DIR"
