"""What nobody read is said once a file, with its count; what was bad is raised or counted."""

import logging

import pytest

from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.unread import Tally


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
