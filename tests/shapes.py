"""What annotations say of arrays, checked at every call: in the tests alone.

`tests/conftest.py` has jaxtyping's import hook put `check_arrays` around the functions and record
classes of some modules. Annotations without arrays are left to the type checker, so that a test may
hand over a stand-in. A program that a test runs in a process of its own is not checked.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from beartype import beartype
from beartype.door import die_if_unbearable
from jaxtyping import AbstractArray


def check_arrays(function: Callable) -> Callable:
    """Return `function` with the arrays that it takes and returns checked."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_arrays(hint)}
    if function.__name__ == "__init__":
        return _check_fields(function, hints)
    function.__annotations__ = hints
    return beartype(function) if hints else function


def _has_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_arrays, get_args(hint)))


def _check_fields(make: Callable, hints: dict[str, Any]) -> Callable:
    """Check the fields of arrays with which a record or a pytree is made.

    JAX makes pytrees of anything, of shardings and abstract arrays say: only those of arrays are
    checked. There a field may be None that is declared as what is found where it is asked for.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if not hasattr(type(self), "_flax_dataclass") or _has_values(self, given):
            for name, hint in hints.items():
                if given.get(name) is not None:
                    die_if_unbearable(given[name], hint)
        return make(self, *args, **kwargs)

    return run


def _has_values(pytree: Any, given: dict[str, Any]) -> bool:
    fields = {field.name: field for field in dataclasses.fields(pytree)}
    nodes = [name for name, one in fields.items() if one.metadata.get("pytree_node", True)]
    # A stand-in has but the fields that a test is about.
    whole = all(given.get(x) is not None or fields[x].default is None for x in nodes)
    leaves = jax.tree.leaves([given.get(name) for name in nodes])
    return whole and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
