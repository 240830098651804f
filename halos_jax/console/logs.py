"""Logging to the console: plain lines on standard output, above the progress bars."""

import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

_QUIET = ("absl", "orbax", "jax", "httpx", "httpx2", "datasets", "transformers", "huggingface_hub")


class _Lines(logging.Handler):
    """Writes each record as lines above the progress bars, so that no bar is left torn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # as every handler of the standard library
            self.handleError(record)


def start_logging() -> None:
    """Log to the console in plain lines; from libraries, only warnings and errors."""
    handler = _Lines()
    handler.addFilter(_mark_record)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(kind)s%(message)s",
        datefmt="%H:%M:%S",
        handlers=[handler],
        force=True,  # replace absl's handler
    )
    for noisy in _QUIET:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.unraisablehook = _print_unraisable


def hush() -> None:
    """Say errors alone from here on: process 0 of the job says everything else."""
    logging.getLogger().setLevel(logging.ERROR)


def _mark_record(record: logging.LogRecord) -> bool:
    """Mark warnings as such; drop the storage library's own messages about failed saves.

    The failure itself is raised when the run waits for the save.
    """
    record.kind = "warning: " if record.levelno >= logging.WARNING else ""
    text = record.getMessage()
    is_thread = "_SignalingThread.run()" in text or "in background save thread" in text
    return not (is_thread and record.exc_info)


def _print_unraisable(unraisable: Any) -> None:
    # When a checkpoint cannot be written, the storage library's threads raise the first error
    # dozens of times. When one array of a checkpoint cannot be read, the reads of the others are
    # given up, and each says so. The failure itself is raised where the run waits for it.
    code = getattr(unraisable.object, "cr_code", None)
    is_given_up = code is not None and "orbax" in Path(code.co_filename).parts
    if str(unraisable.exc_value) != "Event loop is closed" and not is_given_up:
        sys.__unraisablehook__(unraisable)
