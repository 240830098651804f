"""What is said, or found out, once a run, however often its code is reached."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., object])
_forgetters: list[Callable[[], None]] = []


@dataclasses.dataclass
class _Repeat:
    """How often a message came again after it was said, and its last text."""

    level: int
    count: int = 0
    last: str = ""


_said: dict[tuple[str, str], _Repeat] = {}
_forgetters.append(_said.clear)


def once_a_run(function: _Function) -> _Function:
    """Return the function called once for the same arguments, until `forget_run` is called.

    What it logs is logged once a run then. Every later call returns what the first one did.
    """
    cached = functools.cache(function)
    _forgetters.append(cached.cache_clear)
    return cast(_Function, cached)


def say_once(
    logger: logging.Logger, message: str, *values: object, level: int = logging.WARNING
) -> None:
    """Log a message that every stage or round may have, the first time alone; count the others.

    It is the same one if `message` is, and the first value, if that is a text: but for its numbers,
    so that "round 3" is as "round 4".
    """
    about = values[0] if values and isinstance(values[0], str) else ""
    key = message, re.sub(r"\d+", "#", about)
    known = _said.get(key)
    if known is None:
        _said[key] = _Repeat(level)
        logger.log(level, message, *values)
    else:
        known.count, known.last = known.count + 1, message % values


def take_repeats() -> list[tuple[int, str]]:
    """Return a level and a line for each message of `say_once` that came again; begin anew."""
    found = [
        (one.level, f"said once, it came {_show_times(one.count)} more, the last: {one.last}")
        for one in _said.values()
        if one.count
    ]
    _said.clear()
    return found


def _show_times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def forget_run() -> None:
    """Begin a new run: a process may have several of them, one after the other."""
    for forget in _forgetters:
        forget()
