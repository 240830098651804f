"""Says where a run compiles: without it a progress of 0 % looks like a program that hangs.

jax tells listeners when the compilation of a program begins and ends. Tracing is not counted.
"""

import logging
import threading
from typing import Any

import jax.monitoring

logger = logging.getLogger("halos_jax")

_EVENT = "/jax/core/compile/backend_compile_duration"
_PATIENCE = 2.0  # seconds after which a compilation is worth a line


class _Watch:
    """Follows the compilations of a process, each of which begins and ends on one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._timers: dict[int, threading.Timer] = {}

    def begin(self, event: str, value: float, **words: Any) -> None:
        if event == _EVENT:
            name = words.get("fun_name", "a program")
            timer = threading.Timer(_PATIENCE, logger.info, ("compiling %s ...", name))
            timer.daemon = True
            self._cancel(threading.get_ident())  # that of one that raised an error has no end
            self._timers[threading.get_ident()] = timer
            timer.start()

    def end(self, event: str, duration_secs: float, **words: Any) -> None:
        if event == _EVENT:
            self.seconds += duration_secs
            self._cancel(threading.get_ident())

    def forget(self) -> None:
        """Expect the end of no compilation any more."""
        for thread in list(self._timers):
            self._cancel(thread)

    def _cancel(self, thread: int) -> None:
        timer = self._timers.pop(thread, None)
        if timer is not None:
            timer.cancel()


_watch = _Watch()
_is_on = False


def watch_compilations() -> None:
    """Log "compiling NAME ..." from here on, once a compilation has gone on for two seconds."""
    global _is_on
    if not _is_on:
        _is_on = True
        jax.monitoring.register_scalar_listener(_watch.begin)
        jax.monitoring.register_event_duration_secs_listener(_watch.end)


def forget_compilations() -> None:
    """Say nothing of compilations that have begun: jax tells no end of one that raises an error."""
    _watch.forget()


def take_seconds() -> float:
    """Return for how many seconds programs were compiled since the last call."""
    seconds, _watch.seconds = _watch.seconds, 0.0
    return seconds
