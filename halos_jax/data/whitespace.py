"""Runs of spaces and tabs in records turned into one space, as `data.collapse_whitespace` asks."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from halos_jax.types import Completion, Prompt, Turn


def collapse_record(record: Any, completions: Iterable[str]) -> Any:
    """Return a record whose prompt, and whose `completions` (names of fields), are collapsed."""
    changed: dict[str, Any] = {"prompt": collapse_prompt(record.prompt)}
    for name in completions:
        completion: Completion = getattr(record, name)
        changed[name] = dataclasses.replace(completion, turns=_collapse_turns(completion.turns))
    return dataclasses.replace(record, **changed)


def collapse_prompt(prompt: Prompt) -> Prompt:
    """Return a prompt with its turns collapsed."""
    return dataclasses.replace(prompt, turns=_collapse_turns(prompt.turns))


def collapse_text(text: str) -> str:
    """Return a text with each run of spaces and tabs as one space."""
    return re.sub(r"[ \t]+", " ", text)


def _collapse_turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(dataclasses.replace(turn, content=collapse_text(turn.content)) for turn in turns)
