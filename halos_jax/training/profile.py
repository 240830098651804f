"""A trace of some optimizer steps, which xprof reads: `train.profile`.

xprof --logdir=WORKDIR/profile
"""

import logging
from pathlib import Path
from typing import Any

import jax

from halos_jax.once import say_once

logger = logging.getLogger(__name__)

FOLDER = "profile"
_BEFORE = 3  # steps before the traced ones, of which the first compiles


class Profiler:
    """Traces `steps` optimizer steps of a process, the first that come after three others.

    0: none. A process traces once. Every process of a job writes its own part into the folder.
    """

    def __init__(self, workdir: str | Path, steps: int) -> None:
        self.folder = Path(workdir) / FOLDER
        self._steps = steps
        self._seen = 0
        self._is_on = self._is_done = False

    def step(self, after: Any) -> None:
        """Note that a step was started; `after` are its results, waited for at the trace's ends."""
        if not self._steps or self._is_done:
            return
        self._seen += 1
        if self._seen == _BEFORE:
            jax.block_until_ready(after)
            jax.profiler.start_trace(str(self.folder))
            self._is_on = True
        elif self._seen == _BEFORE + self._steps:
            jax.block_until_ready(after)
            self._stop()
            logger.info("train.profile: %d steps are traced in %s", self._steps, self.folder)

    def close(self) -> None:
        """End a trace where the steps end, and say what was not traced."""
        if self._is_on:
            self._stop()
            done = self._seen - _BEFORE
            logger.warning(
                "train.profile: %d of %d steps are traced in %s: there were no more",
                done,
                self._steps,
                self.folder,
            )
        elif self._steps and not self._is_done:
            say_once(
                logger, "train.profile: no step is traced so far: the first %d come before", _BEFORE
            )

    def _stop(self) -> None:
        self._is_on, self._is_done = False, True
        jax.profiler.stop_trace()
