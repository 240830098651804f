"""A run that hangs says where."""

import faulthandler
import subprocess
import sys
import textwrap

import pytest

from halos_jax.console import watchdog


def run(body: str) -> str:
    """Run a program that hangs in a function; return its stderr."""
    program = "import time\nfrom halos_jax.console.watchdog import sign_of_life, watch\n"
    program += "def wait_for_another_host(seconds):\n    time.sleep(seconds)\n"
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "went on\n"
    return done.stderr


def test_the_stacks_of_a_run_that_hangs_are_printed_and_it_goes_on():
    shown = run("""
        with watch(0.4 / 60):
            wait_for_another_host(0.6)
        print("went on")
    """)
    assert shown.startswith("Timeout (") and "in wait_for_another_host" in shown


def test_a_run_that_is_alive_or_done_prints_none():
    assert (
        run("""
        with watch(0):
            wait_for_another_host(0.2)
        with watch(1.4 / 60):
            for _ in range(5):
                wait_for_another_host(0.4)
                sign_of_life()
        wait_for_another_host(1.5)  # nobody watches any more
        print("went on")
    """)
        == ""
    )


def test_signs_in_quick_succession_count_once(monkeypatch):
    """A step of a small model takes a millisecond; arming the timer costs a thread."""
    armed, now = [], [100.0]
    monkeypatch.setattr(watchdog, "_watchdog", watchdog._Watchdog())
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append((now[0], seconds))
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append("off"))
    monkeypatch.setattr(watchdog, "_find_stream", lambda: sys.__stderr__)
    watchdog.sign_of_life()
    with pytest.raises(KeyError), watchdog.watch(2):
        for now[0] in (100.2, 100.9, 101.0, 101.5, 109.0):
            watchdog.sign_of_life()
        raise KeyError
    watchdog.sign_of_life()
    assert armed == [(100.0, 120.0), (101.0, 120.0), (109.0, 120.0), "off"]


def test_without_a_file_for_stderr_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: pytest.fail())
    with watchdog.watch(2):
        watchdog.sign_of_life()
