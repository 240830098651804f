"""Presets: Python files whose function `get_config` returns the configuration of a run.

The `config.json` in the workdir of a run can be given in the place of one.
"""

import difflib
import importlib.util
import json
from pathlib import Path

from ml_collections import ConfigDict

from halos_jax.config import ConfigError, default
from halos_jax.errors import UserError
from halos_jax.user_code import describe_raised

FOLDER = Path(__file__).parents[2] / "configs"
_ALLOWED = "a Python file with a function get_config() that returns a ConfigDict"
_RUN = "config.json"  # what a run keeps of its configuration


def load_preset(given: str) -> ConfigDict:
    """Return the config of a preset: "FILE.py", or "FILE.py:ARGUMENT" to pass an argument to it.

    "DIR/config.json" is the config of the run whose workdir is DIR, wherever DIR was before.

    Raises:
      ConfigError: if there is no such file, or it raises an error; the message names the line.
    """
    file, colon, argument = given.partition(":")
    path = Path(file).expanduser()
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


def list_presets(folder: Path = FOLDER) -> list[str]:
    """Return the names of the presets in a folder."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def explain_absent() -> str:
    """Return the error message for a command line without a preset."""
    return (
        f"--config: got nothing, allowed: {_ALLOWED}; presets here: {', '.join(list_presets())}; "
        "such as --config=configs/quickstart.py"
    )


def _explain_missing(path: Path, file: str) -> str:
    near = path.parent if path.parent.is_dir() and list_presets(path.parent) else FOLDER
    names = list_presets(near)
    close = difflib.get_close_matches(path.stem.replace("_", ""), names, n=1, cutoff=0.5)
    hint = f"did you mean {str(near / f'{close[0]}.py')!r}? " if close else ""
    kind = "is a folder" if path.is_dir() else "there is no such file"
    return (
        f"--config: got {file!r}, which cannot be read as a preset ({kind}); {hint}presets in "
        f"{near}: {', '.join(names) or 'none'}"
    )
