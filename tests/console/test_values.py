"""Metrics in words."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from halos_jax.console import values
from halos_jax.console.values import describe_step, fit, show_metrics


def test_an_interval_stands_behind_what_it_belongs_to():
    values = {"reward_eval": 0.25, "reward_eval/low": 0.125, "reward_eval/high": 1 / 3, "n": 3}
    values |= {"reward_eval/a": 2.0, "reward_eval/a/low": 1.5, "reward_eval/a/high": 2.5}
    values |= {"x/low": 1.0}  # of no mean: a number like any other
    assert show_metrics(values) == [
        "reward_eval 0.25 (0.125 to 0.3333)",
        "n 3",
        "reward_eval/a 2 (1.5 to 2.5)",
        "x/low 1",
    ]


def test_a_step_is_told_by_a_few_of_its_metrics():
    values = {f"logps_train/{number}": 0.5 for number in range(40)}
    values |= {"counters/lr": 5e-6, "rewards_train/accuracies": jnp.float32(0.75)}
    values |= {"loss/train": jnp.float32(0.6931472), "rewards_train/margins": jnp.ones(())}
    assert describe_step(values) == "loss 0.6931, accuracy 0.75, margin 1, lr 5e-06"
    assert describe_step({"round": 1}) == ""


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (40, "loss 0.5, accuracy 0.75, margin 0.125"),
        (37, "loss 0.5, accuracy 0.75, margin 0.125"),
        (36, "loss 0.5, accuracy 0.75, and 1 more"),
        (20, "loss 0.5, and 2 more"),
        (5, "and 3 more"),
    ],
)
def test_a_line_holds_what_there_is_room_for_and_counts_the_rest(width, line):
    assert fit(["loss 0.5", "accuracy 0.75", "margin 0.125"], width=width) == line


def test_a_line_of_nothing():
    assert fit([]) == ""


def test_a_terminal_has_its_width_and_a_log_file_room_for_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for kind, width, text in ((0, values.WHOLE, 100), (1, 80, 80)):
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=bool(kind).__bool__))
        assert (values.find_width(), values.find_text_width()) == (width, text)
    monkeypatch.setenv("COLUMNS", "300")
    assert (values.find_width(), values.find_text_width()) == (300, 100)
