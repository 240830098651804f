"""Functions of the user's own: imported by name, with their errors told in one message."""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from halos_jax.config import ConfigError
from halos_jax.errors import UserError

_FORM = "'package.module:function'"
_PACKAGE = str(Path(__file__).parent) + os.sep
# Users cannot fix installed packages, so errors name the last line outside of these folders.
_INSTALLED = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_LONGEST = 500  # most characters to quote of an error message


class UserCodeError(UserError, RuntimeError):
    """A function of the user raised an error, or tried to end the program."""


def import_function(name: str, field: str) -> Callable[..., Any]:
    """Import the function that "package.module:function" names, for the config's `field`.

    Raises:
      ConfigError: if there is no such module or function, if the import fails (with the line of
        the module), or if it is not a plain function.
    """
    module_name, _, attribute = name.partition(":")
    is_file = "/" in name or module_name.endswith(".py")
    if is_file or not (all(module_name.split(".")) and attribute):
        raise ConfigError(f"{field}: got {name!r}, allowed: {_FORM}; {_suggest_form(name, field)}")
    module = _import_module(module_name, name, field)
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if function is None:
        raise ConfigError(
            f"{field}: got {name!r}, which cannot be imported (module {module_name!r} has no "
            f"{attribute!r}); allowed: {_FORM}; {_list_functions(module, attribute)}"
        )
    kind = _find_fault(function)
    if kind:
        raise ConfigError(f"{field}: got {name!r}, which is {kind}; allowed: a plain function")
    found: Callable[..., Any] = function
    return found


def _find_fault(function: object) -> str:
    """Describe an object that cannot be used as a user's function; return "" if it can."""
    if not callable(function):
        return f"no function but a value of type {type(function).__name__}"
    if inspect.iscoroutinefunction(function):
        return "an async function, of which nobody would wait for the result"
    if inspect.isgeneratorfunction(function):
        return "a generator, which returns no result"
    try:
        inspect.signature(function)
    except (ValueError, TypeError):
        return "a function whose parameters Python does not know"
    return ""


@contextlib.contextmanager
def explain_errors(
    what: str, where: str = "", *, advice: str = "", error: type[UserError] = UserCodeError
) -> Iterator[None]:
    """Turn errors that the user's code raises inside the block into one message with its own line.

    `sys.exit` counts as an error, since it would end the run before its work is done.
    KeyboardInterrupt and UserErrors pass through.

    Args:
      what: the code, such as "reward.function 'my_rewards:score'".
      where: what it was called for, such as "prompt 0ca1, sample 0".
      advice: what the code may do instead.
      error: the type of error to raise.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, UserError):
        raise
    except BaseException as raised:
        for_what = f", for {where}" if where else ""
        line = f"{what} {describe_raised(raised)}{for_what}"
        raise error(f"{line}; {advice}" if advice else line) from raised


def describe_raised(error: BaseException) -> str:
    """Describe an error: "raised ZeroDivisionError: division by zero at my_rewards.py:12"."""
    if isinstance(error, SystemExit):
        found = f"called sys.exit({'' if error.code is None else repr(error.code)})"
    else:
        try:
            text = " ".join(str(error).split())
        except Exception:  # the __str__ of a user's exception may itself fail
            text = "(its message cannot be shown)"
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
        found = f"raised {type(error).__name__}{': ' if text else ''}{text}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{found.partition(' (')[0]} at {_shorten_path(error.filename)}:{error.lineno}"
    place = _find_line(error.__traceback__)
    return f"{found} at {place}" if place else found


def _find_line(trace: TracebackType | None) -> str:
    """Return "file:line" of the user's last frame; of the last frame if none is the user's."""
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    # The first frames belong to this package, which called the user's code.
    foreign = [one for one in frames if not one.filename.startswith(_PACKAGE)]
    own = [one for one in foreign if not one.filename.startswith(_INSTALLED)]
    found = own or foreign or frames
    return f"{_shorten_path(found[-1].filename)}:{found[-1].lineno}" if found else ""


def _shorten_path(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _import_module(module_name: str, name: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, from a module that ends the program
        missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            shown = ", ".join(folder or "." for folder in sys.path[:2])
            reason = f"there is no module {missing!r} in {shown} or the rest of the Python path"
            advice = "set PYTHONPATH=DIR to the folder that holds it"
        else:
            reason = f"its import {describe_raised(error)}"
            advice = "mend the module"
        raise ConfigError(
            f"{field}: got {name!r}, which cannot be imported ({reason}); allowed: {_FORM} on the "
            f"Python path; {advice}"
        ) from error


def _suggest_form(name: str, field: str) -> str:
    module, colon, attribute = name.partition(":")
    if "/" in module or module.endswith(".py"):
        path = Path(module)
        return (
            f"for a file, set PYTHONPATH={path.parent} and "
            f"--config.{field}={path.stem}:{attribute or 'FUNCTION'}"
        )
    if not colon:
        head, dot, attribute = name.rpartition(".")
        return (
            f"did you mean {(head if dot else name) + ':' + (attribute if dot else 'FUNCTION')!r}?"
        )
    return f"did you mean {(module or 'MODULE') + ':' + (attribute or 'FUNCTION')!r}?"


def _list_functions(module: ModuleType, attribute: str) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]
    close = difflib.get_close_matches(attribute, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"it has {', '.join(names[:20])}" if names else "it has no functions"
