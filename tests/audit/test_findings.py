"""Findings: their amounts in words, their table, their counts."""

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


def test_errors_of_several_lines_stay_in_their_line_of_the_table():
    table = findings.format_table(
        [findings.not_checked("inputs", "an input", "seed: got 1\nmesh: got 2")]
    )
    assert table.splitlines()[1:] == [
        "       inputs             not checked  an input: seed: got 1; mesh: got 2"
    ]
