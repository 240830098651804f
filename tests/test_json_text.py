"""Strict JSON: what it takes equals what the standard parser reads, and what it refuses."""

import json
import math

import pytest

from halos_jax.json_text import MAX_DEPTH, parse_json


def nest(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, null, true, "é😀", {"b": {}}]}', "3", '"x"', '{"a": 1, "a": 1}', "[]", " 1\n"],
)
def test_what_is_plain_is_read_as_ever(text):
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_a_pair_is_a_character_and_numbers_may_be_infinite():
    assert parse_json(r'{"\ud83d\ude00": "\uD83D\uDE00"}') == {"😀": "😀"}
    assert parse_json("[1e400, -Infinity]") == [math.inf, -math.inf]
    assert math.isnan(parse_json('{"a": NaN, "a": NaN}')["a"])
    assert parse_json(nest(MAX_DEPTH)) == json.loads(nest(MAX_DEPTH))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1,}', "line 1 column"),
        ("[1] 2", "Extra data"),
        (b"\xff\xfe", "can't decode byte"),
        (b'{"a": "\xed\xa0\x80"}', "can't decode byte"),
        ("\ufeff{}", "BOM"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object, with two values"),
        ('[{"a": 1, "a": true}]', "the key 'a' stands twice"),
        ('{"a": [1], "a": [1, 2]}', "the key 'a' stands twice"),
        (r'["\ud800"]', "half of a surrogate pair in '\\ud800', which is no character"),
        (r'{"\uDC00": 1}', "half of a surrogate pair"),
        (r'{"a": {"b": ["x\ud83d"]}}', "half of a surrogate pair"),
        ('["\ud800"]', "half of a surrogate pair"),
        (nest(MAX_DEPTH + 1), "nested deeper than 64"),
        (nest(100_000), "nested deeper than 64"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested deeper than 64"),
    ],
)
def test_what_is_damaged_or_ambiguous_is_refused(text, message):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert message in str(caught.value)
