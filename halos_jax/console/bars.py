"""How far a piece of work is: a bar on a terminal, a line every ten seconds in a log file."""

import logging
import sys
from typing import Any

import jax
from tqdm import tqdm

logger = logging.getLogger("halos_jax")

SECONDS = 10.0  # between two lines in a log file, and before the first
_LAYOUT = "{desc}: {n:,} of {total:,}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


def make_progress(total: int, description: str, *, unit: str, enabled: bool) -> tqdm:
    """Return the progress of `total` pieces of work, which `update(n)` counts up to.

    `set_postfix_str(text, refresh=False)` adds a text. It is silent unless `enabled`, and on
    processes other than 0. If stderr is no terminal, lines are logged in place of the bar; work
    that is done within ten seconds leaves none.
    """
    settings: dict[str, Any] = {
        "total": total,
        "desc": description,
        "unit": f" {unit}",
        "disable": not enabled or jax.process_index() != 0,
        "leave": False,
    }
    if sys.stderr.isatty():
        settings["dynamic_ncols"] = True
    else:
        settings |= {"file": _Lines(), "mininterval": SECONDS, "delay": SECONDS, "miniters": 0}
        settings["bar_format"] = _LAYOUT
    return tqdm(**settings)


class _Lines:
    """Turns the one line that tqdm redraws into lines of the log."""

    def write(self, text: str) -> None:
        line = " ".join(text.split())  # a rate comes padded
        if line:
            logger.info("%s", line)

    def flush(self) -> None:
        """Do nothing: every line is out."""
