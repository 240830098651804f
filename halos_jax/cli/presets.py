"""Presets: Python files whose function `get_config` returns the configuration of a run.

The `config.json` in the workdir of a run can be given in the place of one.
"""

import ast
import contextlib
import difflib
import functools
import importlib.util
import inspect
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

from halos_jax.config import ConfigError, default
from halos_jax.errors import UserError
from halos_jax.user_code import describe_raised

_INSTALLED = "share/halos_jax/configs"  # where an installation without a checkout has the presets
_ALLOWED = "a Python file with a function get_config() that returns a ConfigDict"
_RUN = "config.json"  # what a run keeps of its configuration


def load_preset(given: str) -> ConfigDict:
    """Return the config of a preset: "FILE.py", or "FILE.py:ARGUMENT" to pass an argument to it.

    "NAME" or "configs/NAME.py", if there is no such file, is the preset of that name which comes
    with the package. "DIR/config.json" is the config of the run whose workdir is DIR, wherever DIR
    was before.

    Raises:
      ConfigError: if there is no such file, or it raises an error; the message names the line.
    """
    file, colon, argument = given.partition(":")
    path = _find_own(Path(file).expanduser())
    if not path.is_file():
        raise ConfigError(_explain_missing(path, file))
    if path.name == _RUN and not colon:
        return _load_run(path)
    try:
        module_spec = importlib.util.spec_from_file_location(f"preset_{path.stem}", path)
        if module_spec is None or module_spec.loader is None:
            raise ImportError("its name does not end with .py")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        _check_argument(module.get_config, file, argument if colon else None)
        config = module.get_config(*([argument] if colon else []))
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # also if the preset calls sys.exit
        raise ConfigError(
            f"--config: got {given!r}, which cannot be read as a preset ({describe_raised(error)});"
            f" allowed: {_ALLOWED}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config: got {given!r}, whose get_config() returns {type(config).__name__}; "
            f"allowed: {_ALLOWED}"
        )
    config.lock()
    return config


def _load_run(path: Path) -> ConfigDict:
    """Return the config in a run's config.json, for the workdir in which that file is."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        plain = error
    if not (isinstance(plain, dict) and {"task", "workdir"} <= plain.keys()):
        raise ConfigError(
            f"--config: got {str(path)!r}, which no run has written; allowed: {_ALLOWED}, or the "
            f"{_RUN} in the workdir of a run"
        )
    plain.pop("segments", None)  # earlier changes of the config, which are not part of it
    config = default()
    config.unlock()
    config.update(plain | {"workdir": str(path.parent)})
    config.lock()
    return config


@functools.cache
def find_folder() -> Path:
    """Return the folder of the presets that come with the package: of the checkout, or installed.

    Where there is neither, it is the checkout's, which does not exist.
    """
    checkout = Path(__file__).parents[2] / "configs"
    if (checkout / "quickstart.py").is_file():
        return checkout
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("halos_jax") or ():
            if file.as_posix().endswith(f"{_INSTALLED}/quickstart.py"):
                return Path(str(file.locate())).resolve().parent
    return checkout


def _find_own(path: Path) -> Path:
    """Return the preset of the package that a path names, if it is no file of the user's."""
    named = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py")
    own = find_folder() / f"{path.stem}.py"
    return own if named and not path.is_file() and own.is_file() else path


def read_summary(file: Path) -> str:
    """Return the first line of a Python file's docstring ("" if none), without running the file."""
    try:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, SyntaxError):
        text = None
    return text.splitlines()[0] if text else ""


def list_presets(folder: Path | None = None) -> list[str]:
    """Return the names of the presets in a folder; None: of those that come with the package."""
    folder = folder or find_folder()
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def explain_absent() -> str:
    """Return the error message for a command line without a preset."""
    return (
        f"--config: got nothing, allowed: {_ALLOWED}; presets here: {', '.join(list_presets())}; "
        "such as --config=quickstart"
    )


def _check_argument(get_config: Callable[..., object], file: str, argument: str | None) -> None:
    """Refuse an argument for a preset that takes none."""
    if argument is not None and not inspect.signature(get_config).parameters:
        raise ConfigError(
            f"--config: got {file}:{argument}, but this preset takes no argument; leave out "
            f"{':' + argument!r}"
        )


def _explain_missing(path: Path, file: str) -> str:
    is_name = path.name != "" and str(path) == path.stem  # of one of the package's
    is_near = not is_name and path.parent.is_dir() and list_presets(path.parent)
    near = path.parent if is_near else find_folder()
    names = list_presets(near)
    close = difflib.get_close_matches(path.stem.replace("_", ""), names, n=1, cutoff=0.6)
    own = near == find_folder()
    named = [name if own else str(near / f"{name}.py") for name in close]
    hint = f"did you mean {named[0]!r}? " if named else ""
    kind = "is a folder" if path.is_dir() else "there is no such file"
    if (path / _RUN).is_file():
        hint = f"a run is --config={path / _RUN}; "
    return (
        f"--config: got {file!r}, which cannot be read as a preset ({kind}); {hint}presets in "
        f"{near}: {', '.join(names) or 'none'}"
    )
