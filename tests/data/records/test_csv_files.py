"""CSV: text as it stands; behind a broken quote only what is a record beyond doubt."""

import csv
import io
import lzma
import random
import re
from collections import Counter

import pytest

from halos_jax.data.records.csv_files import read_csv
from halos_jax.data.records.fields import RecordError


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
        (b'a,b\n"1,2\n', "line 2: a quote is opened here and not closed"),
        (b'a,b\n1,"2" x"y"\n', "line 2: got a broken quote .* each of its own is doubled"),
        (b'a,"b\n', "cannot be read as CSV"),
        (b"a\n\xff\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_broken_csv_is_an_error(tmp_path, data, message):
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=message):
        list(read_csv(str(path)))


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


def read_all(path, lines):
    """Return the records of a file that is read on behind errors, and the errors' places."""
    path.write_text("\n".join(lines) + "\n")
    errors = []
    rows = [
        (line, row.get("a"), row.get("b"))
        for line, row in read_csv(str(path), on_bad=errors.append)
    ]
    return rows, [str(one).removeprefix(f"{path} ").partition(":")[0] for one in errors]


def test_a_record_with_a_broken_quote_is_left_out_alone(tmp_path):
    path = tmp_path / "x.csv"
    good = ['"a","b"', '"1","2"', '"he said "hi" to me","2"', '"3","4\n5"', '"7","8"']
    assert read_all(path, good) == (
        [(2, "1", "2"), (4, "3", "4\n5"), (6, "7", "8")],
        ["line 3"],
    )
    # An odd quote opens a cell, which the next record's first quote ends: that is lost with it.
    odd = ["a,b", '"an inch: 1" long",2', '"3","4"', '5,"6"']
    assert read_all(path, odd) == ([(3, "3", "4"), (4, "5", "6")], ["line 2"])
    opened = ["a,b", '"1,2', "x,y", '"3","4"', '5,"6"']
    assert read_all(path, opened) == ([(5, "5", "6")], ["lines 2 to 4"])


def test_the_rest_of_a_broken_record_is_no_record(tmp_path):
    """Its lines have as many commas as a record, and even quotes."""
    path = tmp_path / "x.csv"
    lines = ["a,b", '"it is "so"', "Hello, world", "still, here", 'the end",6', '"7","8"', "9,10"]
    assert read_all(path, lines) == (
        [(6, "7", "8"), (7, "9", "10")],
        ["line 2", "lines 3 to 4", "line 5"],
    )


def test_records_without_quotes_are_held_until_one_with_them_comes_or_the_file_ends(tmp_path):
    path = tmp_path / "x.csv"
    lines = ["a,b", '"x"y,2', "3,4", "5,6"]
    assert read_all(path, lines) == ([(3, "3", "4"), (4, "5", "6")], ["line 2"])
    assert read_all(path, [*lines, '"7",8']) == (
        [(3, "3", "4"), (4, "5", "6"), (5, "7", "8")],
        ["line 2"],
    )
    # A line that is no record says that those before it may be none, either.
    broken = [*lines[:3], "5", '"7",8']
    assert read_all(path, broken) == ([(5, "7", "8")], ["line 2", "line 3", "line 4"])
    # An empty cell in quotes might as well end one and begin the next.
    assert read_all(path, [*lines, '"",8']) == ([], ["line 2", "lines 3 to 5"])


def test_a_quote_that_stays_open_is_refused_even_where_bad_records_are_left_out(tmp_path):
    path, errors = tmp_path / "x.csv", []
    for broken in ('"3,4', '"3","4'):
        path.write_text(f"a,b\n1,2\n{broken}\n5,6\n7,8\n")
        found = read_csv(str(path), on_bad=errors.append)
        assert next(found) == (2, {"a": "1", "b": "2"})
        with pytest.raises(RecordError, match=r"x.csv line 3: a quote is opened .* begins is not"):
            next(found)
    assert not errors


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
def test_what_is_read_behind_a_broken_quote_was_written_so(tmp_path, quoting):
    """A quote too many anywhere: behind the first error no record is another one."""
    rng, path, counts = random.Random(quoting), tmp_path / "x.csv", Counter()
    texts = [
        "a",
        "1,2",
        "x\ny",
        '5" tall',
        "Hello, world",
        "",
        'say "hi"',
        "one\ntwo, and more\nthree",
    ]
    for _ in range(400):
        rows = [(f"{rng.random():.4f}", rng.choice(texts) + rng.choice(texts)) for _ in range(8)]
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n", quoting=quoting).writerows([("a", "b"), *rows])
        text = stream.getvalue()
        at = rng.randrange(8, len(text))
        text = f'{text[:at]}"{text[at:]}'
        path.write_text(text, newline="")
        errors = []
        try:
            found = list(read_csv(str(path), on_bad=errors.append))
        except RecordError:  # a quote that stays open, or one of the header
            counts["refused"] += 1
            continue
        first = int(re.search(r"lines? (\d+)", str(errors[0]))[1]) if errors else 99
        behind = [(row.get("a", ""), row.get("b", "")) for line, row in found if line > first]
        assert not Counter(behind) - Counter(rows), (text, behind)
        counts["kept"] += len(behind)
        counts["read"] += bool(errors)
    assert counts["read"] > 150 and counts["kept"] > 2 * counts["read"], counts
