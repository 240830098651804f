"""What a record cannot have is found, wherever it stands; all else is what the parser reads."""

import json

import pytest

from halos_jax.data.records.json_door import JsonFault, find_faults, parse_json

GOOD = [
    '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude42 é"], "b": {"c": {}}}',
    '{"big": 123456789012345678901234567890}',
    '"\\\\ud800"',
    "[" * 64 + "]" * 64,
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_read_is_what_the_parser_of_python_reads(text):
    assert parse_json(text) == (json.loads(text), len(text))
    assert parse_json(f"  {text}, 1", 2) == (json.loads(text), len(text) + 2)


@pytest.mark.parametrize(
    ("text", "field", "got"),
    [
        ('{"a": {"b": [0, NaN]}}', "a.b[1]", "NaN"),
        ('{"a": -Infinity}', "a", "-Infinity"),
        ('{"a": 1e400}', "a", "1e400"),
        ('{"a": {"x": 1, "x": 1}}', "a.x", "two values"),
        ('{"a": "x\\ud800"}', "a", "x\ud800"),
        ('{"a": {"\\uDFFF": 1}}', "a", "\udfff"),
        ('{"a": ' + "1" * 4301 + "}", "a", "1" * 4301),
        ('{"ok": 1, "a": ' + "[" * 64 + "]" * 64 + "}", "a" + "[0]" * 63, "more"),
        ('{"ok": 1, "a": ' + "[" * 50_000 + "]" * 50_000 + "}", "a", "more"),
        ('{"ok": {"no": 1}, "a": ' + '{"b":' * 50_000 + "1" + "}" * 50_001, "a", "more"),
    ],
)
def test_what_a_record_cannot_have_is_named(text, field, got):
    with pytest.raises(JsonFault) as caught:
        parse_json(text)
    assert (caught.value.field, caught.value.got) == (field, got)


@pytest.mark.parametrize("text", ["", "{", '{"a" 1}', "[1,]", '"\t"', "{'a': 1}", "nul"])
def test_other_text_is_no_json(text):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert not isinstance(caught.value, JsonFault)


def test_the_place_behind_a_fault_is_known():
    with pytest.raises(JsonFault) as caught:
        parse_json('[{"a": NaN}, 2]', 1)
    assert caught.value.end == 11


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ({"a": {1: 2}, "b": [b"x", object()], "c": (1,)}, ["a", "b[0]", "b[1]", "c"]),
        ({"a": 1 << 20_000}, ["a"]),
        ({"a": [float("inf"), 1.0, 2, True, None, "x"]}, ["a[0]"]),
    ],
)
def test_values_that_were_never_json_are_looked_through(value, fields):
    assert [fault.field for fault in find_faults(value)] == fields
