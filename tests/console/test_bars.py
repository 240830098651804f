"""How far a piece of work is."""

import io
import logging
import sys

import pytest

from halos_jax.console import bars
from halos_jax.console.bars import make_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it; no other thread draws."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr(bars.tqdm, "monitor_interval", 0)
    return clock


def count(clock, total, seconds, **options):
    with make_progress(total, "train 2", unit="steps", enabled=True, **options) as bar:
        for number in range(total):
            clock.now += seconds
            bar.set_postfix_str(f"loss 0.{number}", refresh=False)
            bar.update(1)


def test_a_log_file_gets_a_line_every_ten_seconds(clock, monkeypatch, caplog):
    """No bar, no carriage return, nothing of the terminal."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    count(clock, 800, 1 / 32)
    assert caplog.messages == [
        "train 2: 320 of 800 steps, 32.00 steps/s, 00:15 left, loss 0.319",
        "train 2: 640 of 800 steps, 32.00 steps/s, 00:05 left, loss 0.639",
    ]
    assert "\r" not in caplog.text and sys.stderr.getvalue() == ""


def test_work_of_less_than_ten_seconds_leaves_no_line(clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    count(clock, 9, 1.0)
    assert caplog.messages == []


def test_a_terminal_gets_a_bar_that_goes_away(clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    count(clock, 4, 1.0)
    assert "train 2:  75%" in terminal.getvalue() and "loss 0.2" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r") and not caplog.messages


def test_it_is_silent_when_disabled(clock, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    with make_progress(8, "sample", unit="samples", enabled=False) as bar:
        clock.now += 100
        bar.update(8)
    monkeypatch.setattr(bars.jax, "process_index", lambda: 1)
    count(clock, 8, 100)
    assert capsys.readouterr().err == "" and not caplog.messages
