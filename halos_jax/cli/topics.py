"""What there is to choose from: `--help=losses` and other topics, each a function of `TOPICS`."""

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos_jax.cli.presets import find_folder, list_presets, read_summary
from halos_jax.config import Config, ConfigError, roles, schema
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS, REWARD_KINDS
from halos_jax.config.tasks import load

_WIDTH = 100
# Code -> what it means; `halos_jax/main.py` exits with these.
EXIT_CODES: Mapping[int, str] = {
    0: "done; also of --help and of a check that finds nothing",
    1: "an error: it says what to change, what is done is kept; mode=verify: a difference",
    75: "stopped by a signal and saved: run the same command again to go on",
    130: "stopped by Ctrl-C where there was nothing to save, or by a second one at once",
}


def describe_topic(name: str) -> str:
    """Return the help on a topic.

    Raises:
      ConfigError: if there is no such topic.
    """
    if name not in TOPICS:
        raise ConfigError(f"--help: got {name!r}, allowed: {', '.join(TOPICS)}")
    return "\n".join(TOPICS[name]())


def _list_losses() -> list[str]:
    from halos_jax import losses  # imports jax: only when asked

    def _get_loss(name: str) -> losses.Loss:
        return losses.get_loss({"name": name})

    lines = ["Losses, --config.loss.name=NAME --config.loss.HYPERPARAMETER=VALUE:"]
    for kind, item in ITEM_KINDS.items():
        found = [loss for loss in map(_get_loss, losses.list_losses()) if loss.items == kind]
        if found:
            lines += ["", f"on {item.words} (from feedback: {', '.join(item.feedback) or 'none'})"]
        for loss in found:
            own = {} if loss.divergence is None else vars(loss.divergence)
            lines += _wrap(f"{loss.name}{_show_arguments(loss.function, own)}", 2)
            lines += _wrap(_read_first(getattr(loss.function, "func", loss.function)))
    more = "Their formulas and papers: halos_jax/losses/README.md; a sum of several: loss.name=sum"
    return [*lines, "", more]


def _list_rewards() -> list[str]:
    lines = ["Rewards, --config.reward.kind=KIND:", ""]
    for kind, spec in REWARD_KINDS.items():
        does = _read_first(load(spec.make)).removeprefix("Return the scorer that ")
        needs = f" (needs reward.{spec.needs})" if spec.needs else ""
        lines += [f"  {kind}{needs}", *_wrap(does)]
    lines += ["", "Ready functions, --config.reward.function=halos_jax.rewards.functions:NAME"]
    lines += ["with --config.reward.arguments.ARGUMENT=VALUE:", ""]
    module = inspect.getmodule(load("halos_jax.rewards.functions:exact_answer"))
    for name, function in inspect.getmembers(module, inspect.isfunction):
        parameters = inspect.signature(function).parameters
        if function.__module__ == "halos_jax.rewards.functions" and "response" in parameters:
            lines += _wrap(f"{name}{_show_arguments(function)}", 2)
            lines += _wrap(_read_first(function))
    lines += ["", f"What rewards become, --config.feedback.type: {', '.join(FEEDBACK_TYPES)}"]
    return [*lines, "A function of your own, sums and judges: halos_jax/rewards/README.md"]


def _list_presets() -> list[str]:
    folder = find_folder()
    rows = {name: read_summary(folder / f"{name}.py") for name in list_presets(folder)}
    width = max(map(len, rows), default=0)
    return [
        f"Presets in {folder}, --config=NAME:",
        "",
        *(f"  {name:{width}}  {text}" for name, text in rows.items()),
        "",
        "Every field of one: --config=NAME --help; a preset of your own: configs/README.md",
    ]


def _list_data() -> list[str]:
    sets: Any = load("halos_jax.data.records.hub:HUB_SETS")
    lines = [
        "Data, --config.data.train=SOURCE (and data.eval, data.test); several with commas:",
        "",
        "  FILE                JSON, JSON Lines, CSV, TSV (.gz, .zst, .xz, .bz2), Parquet, Arrow",
        "  DIR, 'DIR/*.jsonl'  its files; DIR@SPLIT: one split of it",
        "  ID@SPLIT            a data set of the hub; ID:CONFIG@SPLIT",
        "  NAME@SPLIT          one of these, each with a reader of its own:",
        "",
    ]
    for name, one in sets.items():
        lines.append(f"  {name}@{{{','.join(one.splits)}}}")
        lines += _wrap(_read_first(one.read))
    return [
        *lines,
        "",
        'A record has a prompt ({"prompt": TEXT} or {"messages": [...]}) and what its task needs:',
        "a demonstration, a pair, a judgement, rewards. Which fields these are, and how others are",
        "renamed: halos_jax/data/records/README.md",
    ]


def _list_exit_codes() -> list[str]:
    return ["Exit codes:", "", *(f"  {code:3}  {text}" for code, text in EXIT_CODES.items())]


# What a resume does with a field of a role.
_ROLES: Mapping[roles.Role, str] = {
    "execution": "how it is computed; results may differ in their last bits",
    "tuning": "the optimizer and the guard, from there on",
    "growing": "to more, and the run goes on",
    "aside": "what no result depends on",
}


def _list_resumable() -> list[str]:
    lines = ["Fields that may change when a run is resumed; all others are fixed at its start:"]
    for role, text in _ROLES.items():
        lines += ["", text]
        for path in _shorten(roles.list_fields(Config, role)):
            tasks = roles.find_mark(Config, path).tasks if role == "growing" else ()
            where = f" (task {', '.join(tasks)})" if tasks else ""
            lines.append(f"  {path}{where}")
        for path in roles.list_fields(Config, "result"):
            mark = roles.find_mark(Config, path)
            if mark.tasks and mark.elsewhere == role:
                lines.append(f"  {path} (but not with task {', '.join(mark.tasks)})")
    return [*lines, "", "and the spelling of a path that leads to the same place or content."]


def _shorten(paths: Sequence[str]) -> list[str]:
    """Return the paths, with "SECTION.*" for each section of which all fields are listed."""

    def find_section(path: str) -> str:
        return path.rpartition(".")[0]

    sizes = Counter(map(find_section, schema.leaf_types(Config)))
    counts = Counter(map(find_section, paths))
    named = [
        f"{one}.*" if (one := find_section(path)) and counts[one] == sizes[one] else path
        for path in paths
    ]
    return list(dict.fromkeys(named))


TOPICS: Mapping[str, Callable[[], list[str]]] = {
    "losses": _list_losses,
    "rewards": _list_rewards,
    "presets": _list_presets,
    "data": _list_data,
    "resume": _list_resumable,
    "exit": _list_exit_codes,
}


def _show_arguments(function: Callable[..., Any], further: Mapping[str, Any] = {}) -> str:
    """Return the keyword arguments of a function with their defaults, as "(beta=0.1)".

    Args:
      further: more of them.
    """
    shown = [
        one.name if one.default is one.empty else f"{one.name}={one.default!r}"
        for one in inspect.signature(function).parameters.values()
        if one.kind is one.KEYWORD_ONLY
    ]
    shown += [f"{name}={default!r}" for name, default in further.items()]
    return f" ({', '.join(shown)})" if shown else ""


def _read_first(function: Callable[..., Any]) -> str:
    """Return the first paragraph of a function's docstring."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


def _wrap(text: str, indent: int = 6) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * max(indent, 4)
    )
