"""The text of `--help`: the program on one screen or, with a preset, every config field."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.cli.overrides import apply_overrides
from halos_jax.cli.presets import find_folder, list_presets, load_preset, read_summary
from halos_jax.cli.topics import EXIT_CODES, TOPICS, describe_topic
from halos_jax.config import Config, ConfigError, docs, schema
from halos_jax.config.tasks import MODES, TASKS

_FLAGS = {"help", "helpshort", "helpfull", "h", "?"}
_WIDTH = 100
_SHORT = {0: "done", 1: "error", 75: "stopped, run it again to go on", 130: "Ctrl-C, nothing saved"}


def takes_help(arguments: Sequence[str]) -> bool:
    """Tell whether the command line asks for help."""
    return any(one.startswith("-") and _split(one)[0] in _FLAGS for one in arguments)


def _split(argument: str) -> tuple[str, str]:
    name, _, value = argument.lstrip("-").partition("=")
    return name, value


def make_help(arguments: Sequence[str], overrides: Sequence[tuple[str, str | None]]) -> str:
    """Return the help that a command line asks for.

    Args:
      arguments: those after the program's name, without `--config.field=value`.
      overrides: the `--config.field=value` arguments, from `overrides.split_overrides`.

    Raises:
      ConfigError: if the preset cannot be read, or an override is wrong.
    """
    topics = [value for name, value in map(_split, arguments) if name in _FLAGS and value]
    if topics:
        return describe_topic(topics[0])
    name = ""
    for argument, behind in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag == "config":
            name = value if equals else behind
    if not name:
        return describe_program()
    preset = load_preset(name)
    errors = apply_overrides(preset, overrides)
    if errors:
        raise ConfigError("\n".join(errors))
    return describe_fields(preset.to_dict())


def describe_program() -> str:
    """Return the help for a command line without a preset: one screen."""
    folder = find_folder()
    presets = {name: read_summary(folder / f"{name}.py") for name in list_presets(folder)}
    return "\n".join(
        [
            "python -m halos_jax.main --config=PRESET --config.FIELD=VALUE ...",
            "",
            "Presets, --config=PRESET (a name, or the path of a file):",
            *_list_rows(presets),
            "Tasks, --config.task=TASK:",
            *_list_rows({name: task.summary for name, task in TASKS.items()}),
            "Modes, --config.mode=MODE:",
            *_list_rows({name: mode.summary for name, mode in MODES.items()}),
            "Every field, with its default and what it allows: --config=PRESET --help",
            f"Lists: --help={', --help='.join(TOPICS)}",
            f"Exit codes: {'; '.join(f'{code} {_SHORT[code]}' for code in EXIT_CODES)}",
            "More: README.md, and the README of each folder of halos_jax/",
        ]
    )


def describe_fields(preset: Mapping[str, Any]) -> str:
    """Return the help for a command line with a preset: each field, its values and its meaning."""
    values = dict(schema.flatten(preset))
    lines = ["Fields are set as --config.FIELD=VALUE; 'here' is the value that this preset gives."]
    for one in docs.list_docs(Config):
        head = f"{one.path}: {one.allowed}"
        if one.default:
            head += f"; default {one.default}"
            head += _describe_set(values.get(one.path), one.default)
        else:
            own = f"{one.path}."
            given = {path: value for path, value in values.items() if path.startswith(own)}
            head += "".join(f"; here {path}={value!r}" for path, value in given.items())
        lines += ["", head, *_wrap(one.text, "    ")]
    return "\n".join(lines)


def _describe_set(value: object, default: str) -> str:
    shown = repr(tuple(value) if isinstance(value, list) else value)
    return "" if value is None or shown == default else f"; here {shown}"


def _list_rows(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [*(f"  {name:{width}}  {text}" for name, text in rows.items()), ""]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
