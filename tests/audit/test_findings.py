"""Findings: their amounts in words, their table, their counts."""

import dataclasses
import re

from halos_jax.audit import findings


def test_what_was_looked_at_in_words():
    assert findings.passed("a", "b", 3, 96, "samples").amount == "3 of 96 samples"
    assert findings.passed("a", "b", 3, unit="files").amount == "3 files"
    assert findings.not_checked("a", "b", "c").amount == ""
    assert findings.not_checked("a", "b", "c", 7, "steps").amount == "0 of 7 steps"


def test_a_comparison_differs_where_a_line_is_wrong():
    good = findings.compare("a", "b", [], 2, unit="files")
    bad = findings.compare("a", "b", ["x", "y", "z", "w"], 9, unit="files")
    assert (good.outcome, good.why) == ("passed", "")
    assert (bad.outcome, bad.why) == ("differs", "x; y; z; and 1 more")
    assert findings.count_outcomes([good, bad, good]) == {
        "passed": 2,
        "differs": 1,
        "not checked": 0,
    }


def test_the_table_has_a_line_for_each_finding():
    found = [
        findings.passed("files", "hashes", 12, unit="files"),
        findings.not_checked("samples", "made again", "no checkpoint"),
    ]
    assert findings.format_table(found).splitlines() == [
        "where  check    looked at  outcome      what",
        "       files    12 files   passed       hashes",
        "       samples             not checked  made again: no checkpoint",
    ]


def test_a_summary_has_a_line_for_each_check_and_all_that_did_not_pass():
    found = [
        dataclasses.replace(findings.passed("files", "hashes", 12, unit="files"), place=place)
        for place in ("round 0", "round 1")
    ]
    lost = findings.not_checked("samples", "made again", "no checkpoint", 8, "samples")
    found += [dataclasses.replace(lost, place=f"round {round}") for round in range(1, 6)]
    assert findings.format_summary(found[:2]) == "files  2 passed"
    found.append(findings.differs("samples", "tokens", "other ones", 1, 9, "samples"))
    told, left = findings.format_summary(found).split("\n\n")
    assert told.splitlines() == ["files    2 passed", "samples  1 differs, 5 not checked"]
    assert [re.split(r" {2,}", line.strip()) for line in left.splitlines()] == [
        ["where", "check", "looked at", "outcome", "what"],
        [
            "round 1; round 2; round 3; and 2 more",
            *("samples", "0 of 40 samples", "not checked", "made again: no checkpoint"),
        ],
        ["samples", "1 of 9 samples", "differs", "tokens: other ones"],
    ]


def test_errors_of_several_lines_stay_in_their_line_of_the_table():
    table = findings.format_table(
        [findings.not_checked("inputs", "an input", "seed: got 1\nmesh: got 2")]
    )
    assert table.splitlines()[1:] == [
        "       inputs             not checked  an input: seed: got 1; mesh: got 2"
    ]
