"""Tables give the records that JSON files of the same values give, and never fewer in silence."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.tables import (
    is_saved,
    read_arrow,
    read_parquet,
    read_saved,
)

TURNS = [{"role": "user", "content": "q"}]
ROWS = [
    {"messages": TURNS, "n": 1, "tags": ["a", "b"]},
    {"messages": [*TURNS, {"role": "assistant", "content": "a", "name": "x"}], "n": None},
]
# Null is not there, in a turn as in a record.
EXPECTED = [(1, ROWS[0]), (2, {"messages": ROWS[1]["messages"]})]


def make_table():
    # Two chunks: a row of each.
    names = pyarrow.Table.from_pylist(ROWS).schema
    return pyarrow.concat_tables(pyarrow.Table.from_pylist([row], names) for row in ROWS)


def write_arrow(path, make):
    table = make_table()
    with make(str(path), table.schema) as writer:
        writer.write_table(table)


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(make_table(), tmp_path / "x.parquet")
    assert list(read_parquet(str(tmp_path / "x.parquet"))) == EXPECTED
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data[:200])
    with pytest.raises(RecordError, match=r"x\.parquet: cannot be read as Parquet after 0 rows"):
        list(read_parquet(str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow(tmp_path, make):
    path = tmp_path / "x.arrow"
    write_arrow(path, make)
    assert list(read_arrow(str(path))) == EXPECTED
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(RecordError, match=r"x\.arrow: cannot be read as Arrow after \d rows"):
        list(read_arrow(str(path)))
    with pytest.raises(RecordError, match="cannot be read as Arrow"):
        list(read_arrow(str(tmp_path / "none.arrow")))


def test_dates_become_text_and_bytes_stay(tmp_path):
    day = datetime.date(2026, 1, 2)
    table = pyarrow.Table.from_pylist([{"day": day, "image": b"\xff", "at": {"day": day}}])
    pyarrow.parquet.write_table(table, tmp_path / "x")
    [(_, row)] = read_parquet(str(tmp_path / "x"))
    assert row == {"day": "2026-01-02", "image": b"\xff", "at": {"day": "2026-01-02"}}


def test_saved_data_sets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    single, several = str(tmp_path / "one"), str(tmp_path / "two")
    rows.save_to_disk(single)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(several)
    assert is_saved(single) and is_saved(several) and not is_saved(str(tmp_path))
    assert list(read_saved(single, "")) == EXPECTED == list(read_saved(several, "train"))
    assert [row for _, row in read_saved(several, "test")] == [EXPECTED[1][1]]
    for split in ("", "dev"):
        with pytest.raises(RecordError, match=f"allowed: {several}@test, {several}@train"):
            list(read_saved(several, split))
    with pytest.raises(RecordError, match=r"got the split 'train', allowed: .*one, which has none"):
        list(read_saved(single, "train"))
    (tmp_path / "one" / "state.json").write_text(json.dumps({}))
    with pytest.raises(RecordError, match="cannot be read as a saved data set"):
        list(read_saved(single, ""))


def test_columns_of_one_name_and_text_that_is_none_are_named(tmp_path):
    path = str(tmp_path / "x.parquet")
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.table([column, column], names=["p", "p"]), path)
    with pytest.raises(RecordError, match=r"the columns \['p', 'p'\]"):
        list(read_parquet(path))
    ends = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0]))
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, ends, pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table([bad], names=["p"]), path)
    with pytest.raises(RecordError, match="cannot be read as Parquet after 0 rows: 'utf-8' codec"):
        list(read_parquet(path))


@pytest.mark.parametrize("form", [{"type": "numpy"}, {"columns": ["messages"]}])
def test_a_saved_format_changes_no_value_and_hides_no_column(tmp_path, form):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.set_format(**form)
    rows.save_to_disk(str(tmp_path / "one"))
    assert list(read_saved(str(tmp_path / "one"), "")) == EXPECTED
