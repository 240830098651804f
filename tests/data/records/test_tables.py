"""Tables give the records that JSON files of the same values give, and never fewer in silence."""

import datetime
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.tables import (
    is_saved,
    read_arrow,
    read_csv,
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


def test_csv_is_text_as_it_stands(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,answer,n\r\n"a, ""b""\nc",007,\r\n\r\n'
        b'NA,null, 1 \r\n"\xc3\xa9",,nan\r\n'
    )
    assert list(read_csv(str(path))) == [
        (2, {"prompt": 'a, "b"\nc', "answer": "007"}),
        (5, {"prompt": "NA", "answer": "null", "n": " 1 "}),
        (6, {"prompt": "é", "n": "nan"}),
    ]
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\nx,y\tz\n")
    assert list(read_csv(str(path))) == [(2, {"a": "x,y", "b": "z"})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1,2\n1\n", "line 3: got 1 cells, allowed: 2"),
        (b"a,b\n1,2,3\n", "line 2: got 3 cells, allowed: 2"),
        (b"a,a\n1,2\n", "line 1: got the header"),
        (b"a,\n1,2\n", "line 1: got the header"),
        (b'a,b\n"1,2\n', "line 2: a quote is opened here, or in a line below, and not closed up"),
        (b'a,b\n1,"2" x"y"\n', "line 2: got a quote within a cell .* two of them there"),
        (b'a,"b\n', "cannot be read as CSV"),
        (b"a\n\xff\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_broken_csv_is_an_error(tmp_path, data, message):
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=message):
        list(read_csv(str(path)))


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


def test_broken_compression_and_bad_lines_of_csv_are_named(tmp_path):
    path = tmp_path / "x.csv.xz"
    packed = bytearray(lzma.compress(b"a,b\n" + bytes(range(48, 58)) * 99))
    packed[len(packed) // 2] ^= 255
    path.write_bytes(packed)
    with pytest.raises(RecordError, match=r"x.csv.xz: cannot be read as CSV"):
        list(read_csv(str(path)))
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,2\n1\n3,4\n")
    errors = []
    rows = list(read_csv(str(path), on_bad=errors.append))
    assert rows == [(2, {"a": "1", "b": "2"}), (4, {"a": "3", "b": "4"})]
    assert ["line 3: got 1 cells" in str(one) for one in errors] == [True]


def test_csv_with_a_broken_quote_is_left_out_up_to_the_end_of_its_record(tmp_path):
    """Its record ends where every record ends: at a line behind an even number of quotes."""
    path, errors = tmp_path / "x.csv", []
    lines = [
        "a,b",
        '"he said "hi" to me",2',
        '3,"4\n5"',
        '"1" or 1" or so',  # three quotes: the record goes on
        'to be sure",6',
        '"1" or',  # two quotes
        'so",6',  # which would be a record elsewhere
        '7,"8"',
        '9,""" ""ten"""',
    ]
    path.write_text("\n".join(lines) + "\n")
    rows = list(read_csv(str(path), on_bad=errors.append))
    assert rows == [
        (3, {"a": "3", "b": "4\n5"}),
        (9, {"a": "7", "b": "8"}),
        (10, {"a": "9", "b": '" "ten"'}),
    ]
    assert [str(one).partition(": ")[0] for one in errors] == [
        f"{path} line 2",
        f"{path} lines 5 to 6",
        f"{path} line 7",
        f"{path} line 8",
    ]
    assert "line 3 is taken for the beginning of the next record" in str(errors[0])


def test_csv_with_a_quote_that_stays_open_is_refused_even_where_bad_records_are_left_out(tmp_path):
    path, errors = tmp_path / "x.csv", []
    for broken in ('"3,4', '"3" inch", 4'):
        path.write_text(f"a,b\n1,2\n{broken}\n5,6\n7,8\n")
        found = read_csv(str(path), on_bad=errors.append)
        assert next(found) == (2, {"a": "1", "b": "2"})
        with pytest.raises(RecordError, match=r"x.csv line 3: a quote is opened .* begins is not"):
            next(found)
    assert not errors


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


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.csv", "prompt;answer\na;b\n", "columns with commas between them, not ';'"),
        ("x.csv", "prompt\tanswer\na\tb\n", r"columns with commas between them, not '\\t'; a file"),
        ("x.tsv", "prompt,answer\na,b\n", "columns with a tab between them, not ','"),
    ],
)
def test_columns_with_another_sign_between_them_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=rf"{name} line 1: got one column, 'prompt.*{message}"):
        list(read_csv(str(tmp_path / name)))
    (tmp_path / "one.csv").write_text('"a,b"\nx\n')
    assert list(read_csv(str(tmp_path / "one.csv"))) == [(2, {"a,b": "x"})]
