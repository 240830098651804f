"""What callers from Python hand over: prompts or texts, samples, feedback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import ConfigError
from halos_jax.data.records import formats
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.types import Judgement, Preference, Prompt, Sample, Turn


def read_asked(prompts: Sequence[Prompt | str]) -> list[Prompt]:
    """Return the prompts in their order, each text as the turn of a user.

    Raises:
      RecordError: if there is none, or one is no prompt, blank, or given twice.
    """
    _refuse_no_list("prompts", prompts, "a list of texts and Prompts")
    if not prompts:
        raise RecordError("prompts: got none, allowed: one or more")
    asked = [one if isinstance(one, Prompt) else _make_prompt(one) for one in prompts]
    if len({one.prompt_id for one in asked}) < len(asked):
        raise RecordError("prompts: got one of them twice; allowed: each once, with its own id")
    return asked


def _make_prompt(text: str) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"prompts: got {shorten(text)}, allowed: Prompts, texts with some text")
    turns = (Turn("user", text),)
    return Prompt(formats.make_prompt_id(turns), turns)


def read_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples as a list.

    Raises:
      RecordError: if that is no list, or one of them is no Sample.
    """
    _refuse_no_list("samples", samples, "a list of Samples")
    for one in samples:
        if not isinstance(one, Sample):
            raise RecordError(
                f"samples: got {_shorten(one)}, allowed: Samples, as `sample` returns"
            )
    return list(samples)


def write_feedback(
    path: Path, feedback: Sequence[Preference | Judgement | Sample], seed: int
) -> None:
    """Write feedback as the records that a round keeps of it.

    Raises:
      RecordError: if that is no list, or one of them is no feedback.
    """
    _refuse_no_list("feedback", feedback, "a list, as `make_feedback` returns")
    formats.write_records(path, [_to_record(one, seed) for one in feedback])


def check_type(name: str, found: object, kinds: Any, allowed: str) -> None:
    """Raise a ConfigError unless the argument `name` is an instance of one of `kinds`."""
    if not isinstance(found, kinds):
        raise ConfigError(f"{name}: got {_shorten(found)}, allowed: {allowed}")


def _to_record(one: Preference | Judgement | Sample, seed: int) -> dict[str, Any]:
    if isinstance(one, Preference):
        return formats.preference_to_record(one, seed=seed, round=0)
    if isinstance(one, Judgement):
        return formats.judgement_to_record(one)
    if isinstance(one, Sample):
        return formats.sample_to_record(one, type="scalar_feedback")
    raise RecordError(f"feedback: got {_shorten(one)}, allowed: what `make_feedback` returns")


def _refuse_no_list(name: str, found: object, allowed: str) -> None:
    if isinstance(found, (str, bytes, dict)) or not isinstance(found, Sequence):
        raise RecordError(f"{name}: got {_shorten(found)}, allowed: {allowed}")


def _shorten(found: object) -> str:
    return f"{shorten(found)} ({type(found).__name__})"
