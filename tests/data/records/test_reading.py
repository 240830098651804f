"""Files are read in every form, and what is broken in one is named with its line and field."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow
import pytest

from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.reading import read_records

RECORDS = [{"a": 1, "b": "é\u2028x"}, {"a": [2, {"c": None}]}, {"a": "end"}]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def lines_of(values) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def zstd(data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


PACKS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd, "xz": lzma.compress}
PACKS["bz2"] = bz2.compress


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x"])
def test_content_and_not_the_name_decides(tmp_path, name, pack):
    as_lines = write(tmp_path / name, pack(lines_of(RECORDS)))
    assert list(read_records(as_lines)) == [(1, RECORDS[0]), (2, RECORDS[1]), (3, RECORDS[2])]
    as_array = write(tmp_path / name, pack(json.dumps(RECORDS, indent=1).encode()))
    assert [record for _, record in read_records(as_array)] == RECORDS


def test_line_numbers_are_those_of_the_file(tmp_path):
    spaced = write(tmp_path / "a", b'\xef\xbb\xbf\n{"a":1}\r\n\n  {"a":2}')
    assert list(read_records(spaced)) == [(2, {"a": 1}), (4, {"a": 2})]
    array = write(tmp_path / "b", b'\n\n[\n{"a":\n1},\n\n{"a":2}, {"a":3}\n]\n')
    assert list(read_records(array)) == [(4, {"a": 1}), (7, {"a": 2}), (7, {"a": 3})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got no records"),
        (b" \n\n", "got no records"),
        (b"[ ]", "got no records"),
        (gzip.compress(b"", mtime=0), "got no records"),
        (b'{"a":1}\n{"a":\n', r"file line 2: got .*allowed: one JSON object a line"),
        (b'{"a":1}\n[1]\n', "file line 2: got"),
        (b'{"a":1}\n7\n', "file line 2: got 7, allowed"),
        (b'{"a":1}\n\xff\n', "file line 2: got"),
        (b'{"a":NaN}', "file line 1: field 'a': got 'NaN', allowed: a finite number"),
        (b'{"b":{"a":[1,-1e999]}}', r"field 'b.a\[1\]': got '-1e999', allowed: a finite"),
        (b'{"a":1,"c":{"a":1,"a":2}}', "field 'c.a': got 'two values', allowed: a field once"),
        (b'{"a":1}{"a":2}', "file line 1: got .*text after its end"),
        (b'{"c":"\\ud800x"}', "field 'c': got .*allowed: valid Unicode"),
        (b'{"\\udc00":1}', "got .*allowed: names that are text, valid Unicode"),
        (b'{"c":["\xed\xa0\x80"]}', "file line 1: got .*can't decode byte"),
        (b'{"n":%s}' % (b"9" * 5000), "field 'n': got '999.*allowed: an integer of at most"),
        (b'{"x":1,"deep":%s1%s}' % (b"[" * 64, b"]" * 64), "field 'deep.*at most 64 deep"),
        (b'{"x":1,"deep":%s' % (b'{"b":' * 90_000), "field 'deep': got 'more', allowed: .*64 deep"),
        (b'[{"a":1},\n{"a":NaN}]', "file line 2: field 'a': got 'NaN'"),
        (b'[{"a":1},\n{"a":2}\n{"a":3}]', "file line 3: broken JSON array"),
        (b'[{"a":1},\n{"a":2}', "file line 2: broken JSON array"),
        (b'[{"a":1},\n]', "file line 2: broken JSON array"),
        (b'[{"a":1}]\n[', "file line 2: broken JSON array"),
        (b'[{"a":1},\n3]', "file line 2: got 3, allowed"),
        (b"[" * 100_000, "file line 1: got .*64 deep"),
        (b"\x1f\x8bnot gzip at all", "broken compressed data"),
        (
            gzip.compress(random.Random(0).randbytes(4000).hex().encode(), mtime=0)[:2000],
            "broken compressed data",
        ),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path, data, message):
    path = write(tmp_path / "file", data)
    with pytest.raises(RecordError, match=message) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(RecordError, match="cannot be read"):
        list(read_records(tmp_path))


def test_empty_files_are_fine_where_asked_for(tmp_path):
    assert list(read_records(write(tmp_path / "a", b""), allow_empty=True)) == []


def test_truncated_files_are_an_error_and_not_fewer_records(tmp_path):
    data = lines_of([{"a": "x" * 50, "n": n} for n in range(2000)])
    for name, pack in PACKS.items():
        packed = pack(data)
        if name != "plain":
            path = write(tmp_path / name, packed[: len(packed) // 2])
            with pytest.raises(RecordError, match=r"broken compressed data|cannot be read"):
                list(read_records(path))
            path = write(tmp_path / name, packed + packed)
            assert len(list(read_records(path))) == 4000


def test_what_is_as_deep_as_may_be_is_read(tmp_path):
    inner = 1
    for _ in range(63):
        inner = [inner]
    assert list(read_records(write(tmp_path / "x", lines_of([{"a": inner}])))) == [
        (1, {"a": inner})
    ]


def test_bad_records_can_be_left_out(tmp_path):
    errors = []
    data = b'{"a":1}\n{"a":\n{"a":1e999}\n[1]\n{"a":2}\n'
    found = list(read_records(write(tmp_path / "x", data), on_bad=errors.append))
    assert found == [(1, {"a": 1}), (5, {"a": 2})]
    assert [str(error).split(":")[0][-6:] for error in errors] == ["line 2", "line 3", "line 4"]
    errors.clear()
    data = b'[{"a":1},\n{"a":1e999},\n{"a":NaN, "b": "]"}\n,3,{"a":2}]'
    found = list(read_records(write(tmp_path / "y", data), on_bad=errors.append))
    assert found == [(1, {"a": 1}), (4, {"a": 2})] and len(errors) == 3


def test_a_value_that_is_no_object_is_named_once(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('"only text"')
    with pytest.raises(RecordError) as caught:
        list(read_records(path))
    assert str(caught.value) == (
        f"{path} line 1: got 'only text', allowed: one JSON object a line, or one array of objects"
    )


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\x03\x04rest", "got a zip archive, allowed: the files in it; unpack it"),
        ('{"prompt": "a"}'.encode("utf-16"), "got text in UTF-16, allowed: UTF-8; convert it"),
        (b"\xfe\xff\x00{", "got text in UTF-16"),
    ],
)
def test_archives_and_other_encodings_are_named(tmp_path, data, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(RecordError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}: {message}")
