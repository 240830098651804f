"""SIGTERM, SIGHUP and Ctrl-C: finish the step, save, and exit with a special code."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

import jax
from jax.experimental import multihost_utils

from halos_jax.console.watchdog import sign_of_life
from halos_jax.errors import UserError

# EX_TEMPFAIL of sysexits.h: run the same command again.
EXIT_CODE = 75
# The exit code by which shells report that Ctrl-C ended a program.
ABORTED = 130

_NAMES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (its terminal was closed)",
}
_FIRST = b"\nCtrl-C: stopping where the run can be resumed; press again to end it now\n"
_SECOND = b"\nended at once by a second Ctrl-C: run the same command again to carry on\n"


class Interrupted(UserError, RuntimeError):
    """The run was asked to stop; everything needed to carry on is on disk."""

    exit_code = EXIT_CODE


# Its arguments: the signal's number, and the frame that was interrupted.
Handler = Callable[..., None]


class StopSignal:
    """Remembers whether a signal to stop has arrived; made by `catch_signals`.

    `place` tells people where in the run it stops: "round 1, stage train".
    """

    def __init__(self) -> None:
        self.place = ""
        self._signal: int | None = None

    def handle(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Record a signal; messages name the first one as the reason for the stop."""
        if self._signal is None:
            self._signal = number

    def received(self, step: int) -> bool:
        """Tell whether to stop after `step`; the answer is the same on all processes of the job."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def check(self) -> None:
        """Stop at a point with nothing to save, if a signal came and this is the only process.

        The processes of a larger job must all stop at the same place, and can agree on one only at
        a training step.

        Raises:
          Interrupted: if a signal came.
        """
        sign_of_life()  # wherever a run looks for a signal, it has just done something
        if jax.process_count() == 1 and self._signal is not None:
            self.interrupt()

    def interrupt(self, step: int | None = None) -> None:
        """Stop after `step`, when everything is saved.

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
    """Catch SIGTERM, SIGHUP and Ctrl-C inside the block, and restore their handlers after it.

    A second Ctrl-C ends the process at once with exit code 130, even in the middle of a
    compilation. A signal that was ignored before (SIGHUP under `nohup`) is still ignored.
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
    if alone:  # otherwise jax.distributed's preemption service handles it for all processes
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
    """Return a handler of SIGHUP that also discards all further output: the terminal is gone."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def outlive(number: int, *frame: object) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        handle(number, *frame)

    return outlive


class _Lenient:
    """An output stream that drops what it cannot write because its terminal has vanished."""

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
    # Writing to a closed terminal fails, possibly before the handler of its SIGHUP has run: a line
    # of progress must not end a run that is about to be saved.
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
    """Answer Ctrl-C on a thread: a Python signal handler would wait for a compilation to end."""
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
