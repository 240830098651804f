"""Prompts from Python: texts become users' turns, and what is no prompt is refused."""

import json

import pytest

from halos_jax.config import ConfigError
from halos_jax.data.asked import check_type, read_asked, read_samples, write_feedback
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.formats import make_prompt_id, sample_from_record
from halos_jax.types import Prompt, Sample, Turn

KNOWN = Prompt("7", (Turn("user", "known"),))


def test_texts_become_turns_of_a_user_in_their_order():
    turns = (Turn("user", "new"),)
    assert read_asked([KNOWN, "new"]) == [KNOWN, Prompt(make_prompt_id(turns), turns)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("known", r"got 'known' \(str\), allowed: a list of texts and Prompts"),
        (3, r"got 3 \(int\), allowed: a list"),
        ([3], "got 3, allowed: Prompts"),
        ([" "], "got ' ', allowed: Prompts"),
        (["a", "a"], "got one of them twice"),
    ],
)
def test_what_is_no_prompt_is_refused(given, message):
    with pytest.raises(RecordError, match=message):
        read_asked(given)


SAMPLE = Sample(KNOWN, 0, "a", (1,), (2,), "stop", "g", reward=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", r"samples: got 'abc' \(str\), allowed: a list of Samples"),
        (3, r"samples: got 3 \(int\), allowed: a list of Samples"),
        ([SAMPLE, "a"], r"samples: got 'a' \(str\), allowed: Samples"),
    ],
)
def test_what_are_no_samples_is_refused(given, message):
    assert read_samples((SAMPLE,)) == [SAMPLE]
    with pytest.raises(RecordError, match=message):
        read_samples(given)


def test_feedback_becomes_records_and_what_is_none_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    write_feedback(path, [SAMPLE], 0)
    assert sample_from_record({**json.loads(path.read_text()), "type": "sample"}) == SAMPLE
    for given, message in (
        ([1], r"feedback: got 1 \(int\), allowed: what `make_feedback` returns"),
        ({"a": 1}, r"feedback: got .*\(dict\), allowed: a list"),
    ):
        with pytest.raises(RecordError, match=message):
            write_feedback(path, given, 0)


def test_an_argument_of_another_type_is_named():
    check_type("policy", None, (int, type(None)), "a number")
    with pytest.raises(ConfigError, match=r"policy: got 'x' \(str\), allowed: a number"):
        check_type("policy", "x", int, "a number")
