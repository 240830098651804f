import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import pytest

from halos_jax.workdir import interrupt
from halos_jax.workdir.interrupt import EXIT_CODE, Interrupted, StopSignal, catch_signals

pytestmark = pytest.mark.usefixtures("default_signals")
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}


@pytest.mark.parametrize("number", NAMES, ids=NAMES.values())
def test_a_signal_is_remembered_until_the_run_can_stop(number):
    before = signal.getsignal(number)
    with catch_signals() as stop:
        stop.check()
        assert not stop.received(step=1)
        os.kill(os.getpid(), number)
        assert stop.received(step=2) and stop.received(step=3)
        stop.place = "round 1, stage sample"
        with pytest.raises(
            Interrupted, match=rf"^stopped by {NAMES[number]}.* in round 1, stage s"
        ):
            stop.check()
    assert signal.getsignal(number) is before


def test_the_message_says_where_and_what_to_do():
    stop = StopSignal()
    stop.handle(signal.SIGINT)
    stop.handle(signal.SIGTERM)  # what comes later is not what stopped it
    stop.place = "round 1, stage train"
    with pytest.raises(Interrupted) as error:
        stop.interrupt(step=0)
    assert str(error.value) == (
        "stopped by Ctrl-C in round 1, stage train, step 0; saved; run the same command again to "
        "carry on"
    )
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM; saved; run the same command"):
        StopSignal().interrupt()


@pytest.mark.parametrize("number", NAMES, ids=NAMES.values())
def test_the_handlers_come_back_after_an_error_too(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyError), catch_signals():
        assert signal.getsignal(number) is not before
        raise KeyError
    assert signal.getsignal(number) is before


def test_what_was_ignored_stays_ignored():
    """As `nohup` does it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_of_a_job_hear_of_every_signal_as_sigterm(monkeypatch):
    """jax's own service listens for that one, and tells all processes."""
    heard, synced = [], []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        service = SimpleNamespace(reached_preemption_sync_point=lambda step: synced.append(step))
        monkeypatch.setattr(interrupt, "multihost_utils", service)
        with catch_signals() as stop:
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
            stop.check()  # not here: the others may be elsewhere
            stop.received(7)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 2 and synced == [7]


def test_the_exit_code_says_try_again():
    assert os.EX_TEMPFAIL == EXIT_CODE


# The second part is C code that lets other threads run and looks for no signal, as a compilation.
BUSY = """
    import hashlib, sys
    from halos_jax.workdir.interrupt import Interrupted, catch_signals
    with catch_signals() as stop:
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"x", int(sys.argv[1]))
        try:
            stop.check()
        except Interrupted as error:
            print(error)
            sys.exit(75)
"""


def test_a_second_ctrl_c_ends_a_compilation_at_once():
    command = [sys.executable, "-c", textwrap.dedent(BUSY), "2000000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "press again to end it now" in process.stderr.readline() + process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None, "the first one lets it go on"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, "")
    assert errors.split("\n")[1:] == [
        "ended at once by a second Ctrl-C: run the same command again to carry on",
        "",
    ]


HUNG_UP = """
    import sys
    from halos_jax.workdir.interrupt import Interrupted, catch_signals
    with catch_signals() as stop:
        try:
            while True:
                print("working", flush=True)  # without a pause: before the signal is seen, too
                stop.check()
        except Interrupted as error:
            print("to nobody", flush=True)
            open(sys.argv[1], "w").write(str(error))
"""


def test_a_run_outlives_its_terminal_to_save(tmp_path):
    file = tmp_path / "ended"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(HUNG_UP), str(file)])
    assert os.read(terminal, 7) == b"working"
    os.close(terminal)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended[1] == 0
    assert file.read_text().startswith("stopped by SIGHUP (its terminal was closed); saved")


def test_a_program_without_an_output_is_no_error(monkeypatch):
    """Python has None for a stream that was closed when it started, as a daemon's may be."""
    monkeypatch.setattr(sys, "stdout", None)
    with catch_signals() as stop:
        assert sys.stdout is None and not stop.received(1)
    assert sys.stdout is None
