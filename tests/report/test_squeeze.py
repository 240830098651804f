"""Data in a page."""

import base64
import gzip
import json
import string

import pytest

from halos_jax.report.squeeze import dump, squeeze, squeeze_json, take_within


@pytest.mark.parametrize("text", ["", "</script><!--", "ü €", "x" * 1_000_000])
def test_a_text_comes_back_and_is_never_markup(text):
    packed = squeeze(text)
    assert set(packed) <= set(string.ascii_letters + string.digits + "+/=")
    assert gzip.decompress(base64.b64decode(packed)).decode() == text
    assert squeeze(text) == packed


def test_json_may_hold_half_a_character_but_no_nan():
    value = {"half": "\ud83d", "number": 1.5}
    assert json.loads(gzip.decompress(base64.b64decode(squeeze_json(value)))) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        squeeze_json(float("nan"))


def test_items_are_taken_while_they_fit():
    items = ["a" * 10, "b" * 10, "c" * 10]
    sizes = [len(squeeze_json(items[:count])) for count in (1, 2)]
    assert take_within(items, 10_000) == (items, 0)
    taken, left = take_within(items, sizes[0])
    assert taken == items[: len(taken)] and 0 < left == 3 - len(taken)
    assert take_within(iter(items), 0) == ([], 3)


def test_what_is_written_in_parts_is_the_same():
    for value in (
        {"columns": ("a", "b"), "prompts": [{"id": "é", "cells": [[1.5, None]]}, {}]},
        [{"x": [1, {"y": 2}]}, "text", [], {}],
        {1: "key", "a": {2: 3}},
        "text",
        None,
    ):
        assert squeeze_json(value) == squeeze(dump(value))
    with pytest.raises(ValueError, match="Out of range"):
        squeeze_json({"a": [1.0, [float("nan")]]})
