"""The config's small languages about fields: what they mean, and what is refused."""

import pytest

from halos_jax.config.field_names import (
    KNOWN,
    SCORES,
    parse_names,
    parse_template,
    split_names,
)


def test_names_are_mapped_from_ours_to_theirs():
    assert parse_names("prompt=problem, completion = final answer") == {
        "prompt": "problem",
        "completion": "final answer",
    }
    assert parse_names("") == {} and split_names(" a,, b ") == ["a", "b"]
    assert ("score_chosen", "score_rejected") in SCORES and "chosen-rating" in KNOWN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem", "got 'problem', allowed: OUR_NAME=FIELD"),
        ("prompt=", "allowed: OUR_NAME=FIELD"),
        ("problems=prompt", "got 'problems' before '='.*the records' own name"),
        ("prompt=a,prompt=b", "got 'prompt' twice"),
    ],
)
def test_other_texts_are_no_mapping(text, message):
    with pytest.raises(ValueError, match=message):
        parse_names(text)


def test_a_template_is_text_and_fields():
    assert parse_template("Solve {question}: in \\boxed{{}}") == [
        ("Solve ", "question"),
        (": in \\boxed{", ""),
        ("}", ""),
    ]
    assert parse_template("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no field", "got 'no field', allowed: a text with a {FIELD}"),
        ("{q} \\boxed{}", "got '{}', allowed: {FIELD}"),
        ("{q:>3}", "got '{q:>3}'"),
        ("{q!r}", "got '{q!r}'"),
        ("{q", "write {{ and }}"),
        ("q}", "write {{ and }}"),
    ],
)
def test_other_braces_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_template(text)
