"""SIGTERM: finish the step, save, and exit with a code of its own."""

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from halos_jax.errors import UserError

# EX_TEMPFAIL of sysexits.h: run the same command again.
EXIT_CODE = 75


class Interrupted(UserError, RuntimeError):
    """The run was asked to stop; everything needed to carry on is on disk."""

    exit_code = EXIT_CODE


class StopSignal:
    """Remembers that SIGTERM came; made by `catch_sigterm`."""

    def __init__(self) -> None:
        self._received = False

    def handle(self, *_) -> None:
        self._received = True

    def received(self, step: int) -> bool:
        """Tell whether to stop after `step`, the same on every process of the job."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def check(self) -> None:
        """Stop here, at a point with nothing to save, if this process is alone and was asked to.

        Processes of one job must stop at the same place, which only a training step offers.

        Raises:
          Interrupted: where SIGTERM came.
        """
        if jax.process_count() == 1 and self._received:
            raise Interrupted("stopped by SIGTERM; run the same command again to carry on")


@contextlib.contextmanager
def catch_sigterm() -> Iterator[StopSignal]:
    """Catch SIGTERM inside the block; the handler that stood before comes back after it."""
    stop = StopSignal()
    if jax.process_count() > 1:
        yield stop  # jax.distributed's preemption service listens for the signal itself
        return
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
