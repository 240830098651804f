"""The line of a stage that is done."""

import doctest

import pytest

from halos_jax.console import stages
from halos_jax.console.stages import describe_stage, show_seconds


@pytest.mark.parametrize(
    ("seconds", "did", "options", "line"),
    [
        (90.0, {"steps": 1}, {}, "1 step in 1 min 30 s; 0.0111 steps/s"),
        (
            2.0,
            {"samples": 4096, "tokens": 50_000},
            {"compiled": 1.26, "left": 200.4},
            "4,096 samples in 2.0 s; 2,048 samples/s; 25,000 tokens/s; 1.3 s of it compiling; "
            "about 3 min 20 s left of the run",
        ),
        (0.0, {"samples": 0}, {"compiled": 0.05}, "0 samples in 0.0 s"),
        (0.5, {"pairs": 30, "groups": 2}, {}, "30 pairs, 2 groups in 0.5 s; 60 pairs/s"),
    ],
)
def test_a_stage_says_what_it_did_and_how_fast(seconds, did, options, line):
    assert describe_stage(seconds, did, **options) == line


def test_the_examples_of_the_documentation():
    assert doctest.testmod(stages) == doctest.TestResults(failed=0, attempted=2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (18_630, "5 h 10 min"),
    ],
)
def test_times_are_for_people(seconds, text):
    assert show_seconds(seconds) == text
