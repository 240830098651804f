"""What the program says on the console: plain lines on the standard output."""

import logging
import sys
from typing import Any


def start_logging() -> None:
    """Log to the console in plain lines; of the libraries only what is worth a warning."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(kind)s%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,  # absl has put its own handler there
    )
    logging.getLogger().handlers[0].addFilter(_mark_record)
    for noisy in ("absl", "orbax", "jax", "httpx", "httpx2", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.unraisablehook = _print_unraisable


def _mark_record(record: logging.LogRecord) -> bool:
    """Give a warning its name; leave out what threads of the storage library say of a failure.

    The failure itself is raised where the save is waited for.
    """
    record.kind = "warning: " if record.levelno >= logging.WARNING else ""
    text = record.getMessage()
    is_thread = "_SignalingThread.run()" in text or "in background save thread" in text
    return not (is_thread and record.exc_info)


def _print_unraisable(unraisable: Any) -> None:
    # When a checkpoint cannot be written, the storage library's threads call an event loop that is
    # closed by then, dozens of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
