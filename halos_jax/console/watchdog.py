"""A run that hangs says where: the stacks of all its threads, after some minutes without a sign."""

import contextlib
import faulthandler
import io
import sys
import time
from collections.abc import Iterator
from typing import TextIO

_PAUSE = 1.0  # seconds within which further signs of life change nothing


class _Watchdog:
    """Has faulthandler print all stacks unless a sign of life comes in time.

    faulthandler counts on a thread of C: it also sees a program that never gives Python back its
    lock, as one that waits for another host.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # 0: it is off
        self._last = -_PAUSE
        self._stream: TextIO | None = None

    def start(self, seconds: float) -> None:
        self._stream = _find_stream()
        self.seconds = seconds if self._stream is not None else 0.0
        self._last = -_PAUSE
        self.sign()

    def sign(self) -> None:
        now = time.monotonic()
        if self.seconds and now - self._last >= _PAUSE and self._stream is not None:
            self._last = now
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self._stream)

    def stop(self) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
        self.seconds = 0.0


_watchdog = _Watchdog()


@contextlib.contextmanager
def watch(minutes: float) -> Iterator[None]:
    """Print the stacks of all threads on stderr if `sign_of_life` is not called for minutes.

    They are printed again after as many minutes more; the program goes on. 0: never.
    """
    _watchdog.start(60 * minutes)
    try:
        yield
    finally:
        _watchdog.stop()


def sign_of_life() -> None:
    """Say that the run is not hanging: something is done. It costs next to nothing."""
    _watchdog.sign()


def _find_stream() -> TextIO | None:
    """Return stderr, or the one of the program's start where that is no file; None: there is none.

    A notebook's is no file.
    """
    for stream in (sys.stderr, sys.__stderr__):
        with contextlib.suppress(AttributeError, OSError, ValueError, io.UnsupportedOperation):
            if stream is not None and stream.fileno() >= 0:
                return stream
    return None
