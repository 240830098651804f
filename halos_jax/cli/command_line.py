"""Error messages for arguments other than `--config` and `--config.field=value`."""

import difflib
from collections.abc import Container, Iterable, Sequence

from halos_jax.config import Config, ConfigError, schema
from halos_jax.config.aliases import find_alias

# HALOs' config paths whose last part does not tell which field here is meant; "" stands for a path
# that needs no field here.
_HALOS = {
    "loss": "loss.name",
    "model": "model.path",
    "model.batch_size": "train.batch_size",
    "model.max_length": "train.max_length",
    "model.max_prompt_length": "sampling.max_prompt_length",
    "model.from_checkpoint": "",
    "cache_reference_logprobs": "",
    "ppo_epochs": "train.epochs",
}
_DASHES = "\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"


def take_check(
    argv: Sequence[str], overrides: Sequence[tuple[str, str | None]]
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Return arguments and overrides with absl's flag `--only_check_args` as `mode=check`.

    absl itself would check only the flags, and so accept any config.
    """
    flag = "--only_check_args"
    rest = [one for one in argv if one not in (flag, f"{flag}=true", flag[1:])]
    asked = len(rest) < len(argv)
    return rest, [*overrides, *([("mode", "check")] if asked else [])]


def refuse_arguments(arguments: Sequence[str], flags: Container[str]) -> None:
    """Raise ConfigError for arguments that are not flags, and suggest what to write instead.

    Args:
      arguments: those after the program's name, without `--config.field=value`.
      flags: the names of all known flags.
    """
    lines, others = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            others += remaining
            break
        if argument.startswith("-") and len(argument) > 1:
            name, equals, value = argument.lstrip("-").partition("=")
            is_next_value = bool(remaining) and not equals and not remaining[0].startswith("-")
            if name in flags or name.removeprefix("no") in flags:
                if is_next_value and name == "config":
                    remaining.pop(0)
                continue
            if is_next_value:
                value = remaining.pop(0)
            lines.append(_explain_flag(name, value, flags))
        else:
            others.append(argument)
    if others:
        lines.append(_explain_others(others))
    if lines:
        raise ConfigError("\n".join(lines))


def _explain_flag(name: str, value: str, flags: Container[str]) -> str:
    path = find_field(name)
    if path:
        return f"--{name}: unknown flag; fields are set as --config.{path}={value or 'VALUE'}"
    close = difflib.get_close_matches(name, ["config", "only_check_args", "help"], n=1)
    hint = f"did you mean --{close[0]}? " if close else ""
    return (
        f"--{name}: unknown flag; {hint}allowed: --config=FILE.py and --config.field=VALUE, with "
        "the fields of halos_jax/config/sections.py"
    )


def _explain_others(arguments: Sequence[str]) -> str:
    shown = f"got arguments {list(arguments)}"
    if any(one[0] in _DASHES for one in arguments if one):
        return f"{shown}, which begin with a long dash; allowed: --config.field=VALUE, two hyphens"
    if len(arguments) == 1 and arguments[0].partition(":")[0].endswith(".py"):
        return f"{shown}; allowed: --config={arguments[0]}"
    settings = [one.lstrip("+~").partition("=") for one in arguments]
    if not all(equals for _, equals, _ in settings):
        return f"{shown}, allowed: --config=FILE.py and --config.field=VALUE"
    found = [(find_field(name), name, value) for name, _, value in settings]
    ours = " ".join(f"--config.{path}={value}" for path, _, value in found if path)
    missing = [name for path, name, _ in found if not path]
    syntax = "HALOs' Hydra syntax" if any(one.startswith("+") for one in arguments) else "no dashes"
    lines = [f"{shown}: {syntax}"]
    lines += [f"here {ours}"] if ours else []
    lines += [f"nothing here is called {', '.join(missing)}"] if missing else []
    return "; ".join([*lines, "configs/README.md, 'From HALOs'"])


def find_field(name: str) -> str:
    """Return the field that a flag, or another library's name, probably means; "" if unknown."""
    name = name.removeprefix("configs.").removeprefix("config.").replace("-", "_")
    known = list(schema.leaf_types(Config))
    free = [f"{section}." for section in schema.free_sections(Config)]
    if name in known or name.startswith(tuple(free)):
        return name
    if name in _HALOS:
        return _HALOS[name]
    same = _unique(path for path in known if path.rpartition(".")[2] == name.rpartition(".")[2])
    return same or find_alias(name) or ""


def _unique(paths: Iterable[str]) -> str:
    found = list(paths)
    return found[0] if len(found) == 1 else ""
