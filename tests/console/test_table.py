"""Tables that are no wider than a terminal."""

import math

import pytest

from halos_jax.console.table import Column, format_table, show_estimate

COLUMNS = [
    Column("round", ["0", "12"]),
    Column("none", ["", ""]),
    Column("stale", ["", "0.07"], 2),
    Column("reward", ["1.50", "-2.25"]),
    Column("steps", ["3", "4"], 1),
]


def test_columns_are_aligned_and_those_without_a_value_are_left_out():
    assert (
        format_table(COLUMNS)
        == """\
round  stale  reward  steps
    0      -    1.50      3
   12   0.07   -2.25      4"""
    )


@pytest.mark.parametrize(
    ("width", "names", "last"),
    [
        (27, "round stale reward steps", ""),
        (26, "round reward steps", "(no room for: stale)"),
        (19, "round reward", "(no room for: stale, steps)"),
        (3, "round reward", "(no room for: stale, steps)"),  # those of rank 0 stay
    ],
)
def test_what_finds_no_room_is_named(width, names, last):
    lines = format_table(COLUMNS, width=width).splitlines()
    assert lines[0].split() == names.split()
    assert lines[3:] == ([last] if last else [])


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (2.2034, 0.668, "2.20 ±0.67"),
        (0.66812, 0.03812, "0.668 ±0.038"),
        (0.66812, 0.00012, "0.668 ±0.000"),
        (-123.456, 61.7, "-123 ±62"),
        (5.25, 1.5, "5.2 ±1.5"),
        (-0.0001, 0.2, "0.00 ±0.20"),
        (1.0, 0.0, "1.000 ±0.000"),
        (1.0, math.nan, "1.000 ±nan"),
    ],
)
def test_an_estimate_has_the_digits_that_its_interval_leaves(mean, half, shown):
    values = {"x": mean, "x/low": mean - half, "x/high": mean + half}
    assert show_estimate(values, "x") == shown
    assert show_estimate({"x": mean}, "x") == f"{mean:z.3f}" and show_estimate({}, "x") == ""
