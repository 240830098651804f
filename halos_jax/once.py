"""What is said, or found out, once a run, however often its code is reached."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., object])
_forgetters: list[Callable[[], None]] = []


def once_a_run(function: _Function) -> _Function:
    """Return the function called once for the same arguments, until `forget_run` is called.

    What it logs is logged once a run then. Every later call returns what the first one did.
    """
    cached = functools.cache(function)
    _forgetters.append(cached.cache_clear)
    return cast(_Function, cached)


def forget_run() -> None:
    """Begin a new run: a process may have several of them, one after the other."""
    for forget in _forgetters:
        forget()
