"""What the console shows."""

import logging
import sys
from types import SimpleNamespace

from halos_jax.console import logs


def make_unraisable(text, file=None):
    code = SimpleNamespace(cr_code=SimpleNamespace(co_filename=file)) if file else None
    return SimpleNamespace(exc_value=RuntimeError(text), object=code)


def test_the_noise_of_a_failed_checkpoint_is_left_out(monkeypatch):
    """It was seen on a full disk and a cut file; what else cannot be raised is still printed."""
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    others = [
        make_unraisable("something else"),
        make_unraisable("something else", "/site-packages/httpx/client.py"),
    ]
    for one in (
        make_unraisable("Event loop is closed"),
        make_unraisable("error while reading", "/site-packages/orbax/checkpoint/serialization.py"),
        *others,
    ):
        logs._print_unraisable(one)
    assert printed == others


def test_what_a_storage_thread_says_of_a_failure_is_left_out_and_warnings_are_named():
    def make(text, level=logging.INFO, **options):
        options = {"exc_info": None} | options
        return logging.LogRecord("absl", level, "f.py", 1, text, (), options["exc_info"])

    trace = (ValueError, ValueError("x"), None)
    plain, warning = make("round 1"), make("odd", logging.WARNING)
    assert logs._mark_record(plain) and plain.kind == ""
    assert logs._mark_record(warning) and warning.kind == "warning: "
    for text in (
        "[thread=x] _SignalingThread.run() raised an exception: full",
        "Failed to run 4 Handler Commit operations in background save thread, directory: x",
    ):
        assert not logs._mark_record(make(text, logging.ERROR, exc_info=trace))
        assert logs._mark_record(make(text, logging.ERROR))
    assert logs._mark_record(make("other", logging.ERROR, exc_info=trace))


def test_logs_are_plain_lines_on_the_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.start_logging()
        logging.getLogger("halos_jax").info("round 1 of 4 done")
        logging.getLogger("halos_jax").warning("all samples were cut")
        logging.getLogger("orbax").info("noise")
        written = capsys.readouterr()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    first, second = written.out.splitlines()[-2:]
    assert written.err == "" and first.endswith(" round 1 of 4 done")
    assert second[8:] == " warning: all samples were cut"
    assert "noise" not in written.out
