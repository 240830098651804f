"""SIGTERM, SIGHUP and Ctrl-C: finish the step, save, and exit with a code of its own."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

import jax
from jax.experimental import multihost_utils

from halos_jax.errors import UserError

# EX_TEMPFAIL of sysexits.h: run the same command again.
EXIT_CODE = 75
# As a shell says that Ctrl-C has ended a program.
ABORTED = 130

_NAMES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (its terminal was closed)",
}
_FIRST = b"\nCtrl-C: the run ends where it can be carried on; once more ends it at once\n"
_SECOND = b"\nended at once by a second Ctrl-C: run the same command again to carry on\n"


class Interrupted(UserError, RuntimeError):
    """The run was asked to stop; everything needed to carry on is on disk."""

    exit_code = EXIT_CODE


# Takes the signal's number and the frame that was interrupted.
Handler = Callable[..., None]


class StopSignal:
    """Remembers that a signal to stop came; made by `catch_signals`.

    `place` says for people where the run is: "round 1, stage train".
    """

    def __init__(self) -> None:
        self.place = ""
        self._signal: int | None = None

    def handle(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Take note of a signal; the first one is what the run is stopped by."""
        if self._signal is None:
            self._signal = number

    def received(self, step: int) -> bool:
        """Tell whether to stop after `step`, the same on every process of the job."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def check(self) -> None:
        """Stop here, at a point with nothing to save, if this process is alone and was asked to.

        Processes of one job must stop at the same place, which only a training step offers.

        Raises:
          Interrupted: where a signal came.
        """
        if jax.process_count() == 1 and self._signal is not None:
            self.interrupt()

    def interrupt(self, step: int | None = None) -> None:
        """Stop here, where all is saved, after `step`.

        Raises:
          Interrupted: always.
        """
        name = _NAMES[signal.Signals(self._signal or signal.SIGTERM)]
        steps = [] if step is None else [f"step {step}"]
        where = ", ".join(part for part in [self.place, *steps] if part)
        raise Interrupted(
            f"stopped by {name}{f' in {where}' if where else ''}; saved; run the same command "
            "again to carry on"
        )


@contextlib.contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Catch SIGTERM, SIGHUP and Ctrl-C inside the block; after it all is as it was before.

    A second Ctrl-C ends the process at once, in the middle of a compilation too, with exit code
    130. A signal that was ignored before (SIGHUP by `nohup`) stays so.
    """
    stop = StopSignal()
    alone = jax.process_count() == 1

    def forward(number: int, *_: object) -> None:
        stop.handle(number)
        os.kill(os.getpid(), signal.SIGTERM)

    handle = stop.handle if alone else forward
    handlers: dict[int, Handler] = {
        signal.SIGINT: handle,
        signal.SIGHUP: _outlive_terminal(handle),
    }
    if alone:  # else jax.distributed's preemption service listens for it, on all processes at once
        handlers[signal.SIGTERM] = handle
    before = {number: signal.getsignal(number) for number in handlers}
    caught = [number for number in handlers if before[number] is not signal.SIG_IGN]
    with _watch_keyboard(enabled=signal.SIGINT in caught), _survive_lost_terminal():
        try:
            for number in caught:
                signal.signal(number, handlers[number])
            yield stop
        finally:
            for number in caught:
                signal.signal(number, before[number])


def _outlive_terminal(handle: Handler) -> Handler:
    """Return a handler of SIGHUP after which the output goes nowhere: its terminal is gone."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def outlive(number: int, *frame: object) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        handle(number, *frame)

    return outlive


class _Lenient:
    """An output stream whose terminal may vanish: what cannot be written then is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _survive_lost_terminal() -> Iterator[None]:
    # Writing to a closed terminal fails at once, which may be before the handler of its SIGHUP has
    # run: a line of progress must not end a run that is about to be saved.
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Lenient(stream)) if stream and stream.isatty() else stream
        for stream in before  # None where the program was started without it
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _watch_keyboard(*, enabled: bool) -> Iterator[None]:
    """Answer Ctrl-C on a thread: a handler in Python waits until a compilation is over."""
    if not enabled:
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        count = 0
        while (number := os.read(read, 1)) and number != b"\0":  # a zero ends the thread
            if number[0] != signal.SIGINT:
                continue
            count += 1
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(2, _FIRST if count == 1 else _SECOND)
            if count > 1:
                os._exit(ABORTED)

    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="keyboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
