"""What nobody read is said once a file, with its count; what was bad is raised or counted."""

import logging

import pytest

from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.unread import Skips, Tally


def add(tally, file, record, *read):
    fields = Fields(record, file, 1)
    for name in read:
        fields.get(name)
    tally.add(fields)
    return fields


def test_unread_fields_are_said_once_a_file(caplog):
    tally = Tally("a,b", Edits(ignored=frozenset({"id"})))
    add(tally, "a", {"prompt": "q", "context": "c", "id": 3, "none": None}, "prompt")
    add(tally, "a", {"prompt": "q", "context": "c", "meta": {"a": 1}}, "prompt")
    add(tally, "b", {"prompt": "q"}, "prompt")
    fields = add(tally, "c", {"messages": []}, "messages")
    fields.leave(["messages[].id"])
    tally.add(fields)
    with caplog.at_level(logging.INFO):
        tally.report()
    first, second = caplog.messages
    assert (
        "a: 2 records; fields that are not read, and in how many: context (2), meta (1);" in first
    )
    assert "c: 2 records; fields that are not read, and in how many: messages[].id (1);" in second


def test_fields_of_our_own_files_and_of_named_sets_are_no_news(caplog):
    tally = Tally("f", Edits())
    add(tally, "f", {"type": "pairwise_feedback", "generator_A": "x", "reward_difference": 1})
    add(tally, "shp@train", {"source": "x"})
    tally.report()
    assert not caplog.messages
    add(tally, "f", {"type": "pairwise_feedback", "generator_A": "x", "other": 1})
    tally.report()
    assert "in how many: other (1);" in caplog.text


def test_bad_records_are_raised_or_counted(caplog):
    with pytest.raises(RecordError, match="f line 1"):
        Tally("f", Edits()).skip(RecordError("f line 1"))
    tally = Tally("f", Edits(skip=True))
    add(tally, "f", {})
    for line in range(5):
        tally.skip(RecordError(f"f line {line}: bad"))
    tally.report()
    assert (
        "f: 5 bad records are left out (data.skip_bad), 1 are read; the first: f line 0: bad; f"
        in (caplog.text)
    )
    assert "line 3" not in caplog.text


def test_of_a_field_that_is_read_in_part_the_other_parts_are_said(caplog):
    meta = {"question": "q", "url": "u", "empty": "", "deep": {"answer": "a", "by": "me"}}
    tally = Tally("a", Edits(ignored=frozenset({"kept"})))
    add(tally, "a", {"meta": meta, "kept": {"a": 1, "b": 2}}, "meta.question", "meta.deep.answer")
    add(tally, "a", {"meta": meta, "a.b": 1}, "meta.question", "meta.deep", "a.b", "kept.a")
    tally.report()
    assert "in how many: meta.deep.by (1), meta.url (2);" in caplog.text


def test_where_nothing_is_left_it_is_an_error():
    skips = Skips(allowed=True)
    skips.require("f", 0)
    skips.add(RecordError("f line 1: bad"))
    skips.require("f", 1)
    with pytest.raises(
        RecordError, match=r"f: data\.skip_bad leaves out all of its 1 records; the "
    ):
        skips.require("f", 0)
