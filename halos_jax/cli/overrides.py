"""Parse the command line's `--config.field=value` arguments by the types of the schema."""

import os
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from halos_jax.config import Config, schema


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take the `--config.path=value` and `--config.path value` arguments out of `argv`.

    They are parsed here rather than by the flag library so that a typo is reported together
    with all other errors. A missing value is returned as None.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        name, equals, given = argument.partition("=")
        value: str | None = given
        if not name.startswith(("-config.", "--config.")):
            if name in ("-config", "--config") and given.startswith("~"):  # no shell expands it
                argument = f"{name}={os.path.expanduser(given)}"
            rest.append(argument)
            continue
        if not equals:  # one dash: a negative number; two: the next flag
            is_missing = not remaining or remaining[0].startswith("--")
            value = None if is_missing else remaining.pop(0)
        overrides.append((name.lstrip("-").removeprefix("config."), value))
    return rest, overrides


def apply_overrides(config: ConfigDict, overrides: Iterable[tuple[str, Any]]) -> list[str]:
    """Set each path in `config` to its value, with text parsed by its type; return the errors."""
    errors, leaves, free = [], schema.leaf_types(Config), schema.free_sections(Config)
    for path, value in overrides:
        annotation = leaves.get(path)
        member = schema.split_member(Config, path)
        if member is not None:
            annotation = schema.leaf_types(member[1]).get(member[2])
        inside = [section for section in free if path.startswith(f"{section}.")]
        if value is None:
            errors.append(f"{path}: got no value; write --config.{path}=VALUE")
        elif inside and annotation is None:
            _set_free(
                config, path, schema.parse_literal(value) if isinstance(value, str) else value
            )
        elif annotation is None:
            errors.append(schema.explain_unknown(path, Config))
        else:
            try:
                reader = schema.parse if isinstance(value, str) else schema.convert
                read = reader(value, annotation)
                if inside:
                    _set_free(config, path, read)
                else:
                    config.update_from_flattened_dict({path: read})
            except ValueError:
                errors.append(schema.explain_value(path, value, annotation))
    return errors


def _set_free(config: ConfigDict, path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    section = config
    with config.unlocked():
        for name in parents:
            if not isinstance(section.get(name), ConfigDict):
                section[name] = ConfigDict()
            section = section[name]
        section[leaf] = value
