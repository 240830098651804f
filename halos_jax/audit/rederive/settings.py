"""The config that a run had at some place: that of its last start, without the changes after it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax import config as config_lib
from halos_jax.config import Config, ConfigError, schema

Segment = Mapping[str, Any]
Place = tuple[int, int]  # a round, and the optimizer steps that were taken before


def locate(segment: Segment) -> Place:
    """Return where in a run a recorded change took effect."""
    return int(segment.get("round", 0)), int(segment.get("step", 0))


def undo_changes(config: Config, segments: Sequence[Segment], place: Place) -> Config:
    """Return the config that a run had at `place`.

    Args:
      config: the config of its last start.
      segments: its recorded changes, oldest first.

    Raises:
      ConfigError: if a recorded value is none that this version reads.
    """
    plain = copy.deepcopy(config_lib.to_dict(config))
    for segment in reversed([one for one in segments if locate(one) > place]):
        for path, (old, new) in segment["changed"].items():
            section, name = _find(plain, path)
            if section is not None and section.get(name) == new:
                section[name] = old
    errors: list[str] = []
    found: Config = schema.build(Config, plain, errors)
    if errors:
        raise ConfigError(f"config.json: its segments are not of this version: {'; '.join(errors)}")
    return found


def list_before(segments: Sequence[Segment], place: Place) -> tuple[Segment, ...]:
    """Return the changes that took effect at `place` or before."""
    return tuple(one for one in segments if locate(one) <= place)


def find_break(segments: Sequence[Segment], place: Place) -> int | None:
    """Return the step within the round of `place` at which the settings changed; None: nowhere."""
    round, step = place
    inside = [at for number, at in map(locate, segments) if number == round and at > step]
    return min(inside, default=None)


def count_prompts(groups: Sequence[int], segments: Sequence[Segment], place: Place) -> int:
    """Return how many prompts the order of a run had at `place`.

    Args:
      groups: how many prompts it was started with, and how many each later addition brought.
    """
    sizes = {sum(groups[: end + 1]) for end in range(len(groups))}
    for segment in segments:
        grown = segment["changed"].get("data.train")
        if grown and locate(segment) > place:
            before = str(grown[0]).partition(" ")[0]
            if before.isdigit() and int(before) in sizes:
                return int(before)
    return sum(groups)


def _find(plain: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    *sections, name = path.split(".")
    inner: Any = plain
    for section in sections:
        inner = inner.get(section) if isinstance(inner, dict) else None
    return (inner if isinstance(inner, dict) else None), name
