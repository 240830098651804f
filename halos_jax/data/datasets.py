"""Prompts, conversations and feedback from files and from hub data sets.

A source is a file (.json, .jsonl, gzip of either) or a hub data set as "name@split" or
"name:config@split". Both give the same record shapes: HALOs', TRL's, chat messages, and the common
instruction and question forms.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from halos_jax.data.fields import Fields, RecordError
from halos_jax.data.records import (
    digest,
    judgement_from_record,
    make_prompt_id,
    preference_from_record,
    read_records,
    sample_from_record,
    turns_to_record,
)
from halos_jax.data.tokenize import split_preferences
from halos_jax.types import Completion, Judgement, Preference, Prompt, Sample, Turn

logger = logging.getLogger(__name__)

_PROMPT_FIELDS = ("prompt", "messages", "instruction", "question")
_TARGET_FIELDS = ("completion", "output", "response", "answer")
# Fields with a meaning of their own; everything else of a record becomes the prompt's `extra`.
_STRUCTURE = (
    {"prompt", "messages", "instruction", "input", "question", "prompt_id", "prompt_ids"}
    | {"type", "split", "extra", "dataset", "label", "chosen", "rejected", "reward_difference"}
    | {"response_ids", "logps", "ids_A", "ids_B"}
    | {
        name + side
        for name in ("output", "reward", "generator", "finish_reason", "sample_id")
        for side in ("", "_A", "_B")
    }
)

_Item = TypeVar("_Item")


def load_prompts(source: str, *, limit: int = 0, split: str | None = None) -> list[Prompt]:
    """Load the distinct prompts of `source`, in its order; the first `limit` where that is not 0.

    Exact duplicates are dropped and their number is logged. `prompt_id` is kept where a record has
    it, else it is a hash of the conversation.

    Args:
      source: a file, or a hub data set as "name@split" or "name:config@split".
      limit: how many prompts to load; 0 loads all.
      split: load only records whose field `split` has this value.

    Raises:
      RecordError: for a bad record, a prompt that does not end with the user, or one id with two
        contents.
    """
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for fields in _read_source(source, split):
        if limit and len(prompts) == limit:
            break
        prompt = _read_prompt(fields)
        known = prompts.setdefault(prompt.prompt_id, prompt)
        if known is not prompt:
            _check_same(fields, known, prompt)
            duplicates += 1
    if duplicates:
        logger.info("%s: %d prompts, %d exact duplicates dropped", source, len(prompts), duplicates)
    return list(prompts.values())


def load_conversations(
    source: str, *, limit: int = 0, split: str | None = None
) -> list[tuple[Prompt, str]]:
    """Load (prompt, target text) pairs for supervised training; arguments as `load_prompts`.

    Takes prompt + completion / output / response / answer, messages that end with the assistant,
    prompt + chosen, and feedback files, whose target is the preferred output. Feedback repeats its
    outputs over pairs: a (prompt, output) that was there before is left out, as is an undesirable
    output, and both are counted in the log.
    """
    conversations: list[tuple[Prompt, str]] = []
    seen: set[tuple[str, str]] = set()
    repeated = undesirable = 0
    for fields in _read_source(source, split):
        if limit and len(conversations) == limit:
            break
        is_feedback = fields.has("output_A") or fields.record.get("type") == "binary_feedback"
        if is_feedback and not fields.has("output_A") and not fields.label():
            undesirable += 1
            continue
        prompt, target = _read_conversation(fields)
        key = (prompt.prompt_id, target)
        if is_feedback and key in seen:
            repeated += 1
            continue
        seen.add(key)
        conversations.append((prompt, target))
    if repeated or undesirable:
        logger.info(
            "%s: %d conversations; left out: %d repeated, %d undesirable outputs",
            source,
            len(conversations),
            repeated,
            undesirable,
        )
    return _require_some(conversations, source)


def load_preferences(source: str, *, limit: int = 0, split: str | None = None) -> list[Preference]:
    """Load preferences from pairwise_feedback or chosen/rejected records; as `load_prompts`."""
    preferences = []
    for fields in _read_source(source, split):
        if limit and len(preferences) == limit:
            break
        preferences.append(_read_preference(fields))
    return _require_some(preferences, source)


def load_judgements(source: str, *, limit: int = 0, split: str | None = None) -> list[Judgement]:
    """Load answers with their labels; arguments as `load_prompts`, `limit` counts records.

    Takes binary_feedback, TRL's unpaired records (prompt, completion, label), and every record of
    `load_preferences`, of which the chosen answer is desirable and the rejected one is not.
    """
    judgements: list[Judgement] = []
    preferences: list[Preference] = []
    for count, fields in enumerate(_read_source(source, split)):
        if limit and count == limit:
            break
        if fields.has("output_A") or fields.has("chosen"):
            preferences.append(_read_preference(fields))
        else:
            judgements.append(_read_judgement(fields))
    return _require_some(judgements + split_preferences(preferences), source)


def load_scored(source: str, *, limit: int = 0, split: str | None = None) -> list[Sample]:
    """Load samples with rewards (scalar_feedback); arguments as `load_prompts`.

    A sample without a reward is left out, and their number is logged.
    """
    samples, unlabelled = [], 0
    for fields in _read_source(source, split):
        if limit and len(samples) == limit:
            break
        sample = sample_from_record(fields.record, file=fields.file, line=fields.line)
        unlabelled += sample.reward is None
        if sample.reward is not None:
            samples.append(sample)
    if unlabelled:
        logger.info("%s: %d samples, %d without a reward", source, len(samples), unlabelled)
    return _require_some(samples, source)


def order_prompts(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """Return the prompts in the fixed order of a run, whatever order they come in."""
    return sorted(
        prompts, key=lambda prompt: (digest("order", seed, prompt.prompt_id), prompt.prompt_id)
    )


def identify_prompts(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of prompts in order, by which a resumed run knows that it has the same."""
    return digest([[prompt.prompt_id, turns_to_record(prompt.turns)] for prompt in prompts])


# --------------------------------------------------------------------------- sources


def _read_source(source: str, split: str | None) -> Iterator[Fields]:
    """Yield the records of a file or hub data set, those of `split` where it is given."""
    count = 0
    for number, record in _open_source(source):
        fields = Fields(record, source, number)
        if split is None or fields.text("split") == split:
            count += 1
            yield fields
    if not count:
        wanted = "record" if split is None else f"record whose field 'split' is {split!r}"
        raise RecordError(f"{source}: got no {wanted}, allowed: at least one; check the source")


def _open_source(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    name, _, split = source.rpartition("@")
    if os.path.exists(source):
        return read_records(source)
    if name and split and not source.endswith((".json", ".jsonl", ".gz")):
        return _read_hub(source, name, split)
    raise RecordError(
        f"{source}: no such file; allowed: a .json or .jsonl file (or .gz of it), or a hub data "
        "set as 'name@split' or 'name:config@split'"
    )


def _read_hub(source: str, name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets  # Seconds to import, and only hub data sets need it.
    except ImportError as error:
        raise RecordError(
            f"{source}: hub data sets need the package 'datasets'; install it"
        ) from error
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise RecordError(
            f"{source}: cannot load the data set: {reason}; allowed: 'name@split' or "
            "'name:config@split'"
        ) from error
    yield from enumerate(rows, start=1)


def _require_some(items: list[_Item], source: str) -> list[_Item]:
    if not items:
        raise RecordError(f"{source}: nothing to train on is left of its records")
    return items


# --------------------------------------------------------------------------- record shapes


def _read_prompt(fields: Fields) -> Prompt:
    return _make_prompt(fields, _read_prompt_turns(fields))


def _make_prompt(fields: Fields, turns: tuple[Turn, ...]) -> Prompt:
    """Make the Prompt of a record from its turns, which must end with something of the user."""
    if not turns or turns[-1].role != "user":
        roles = [turn.role for turn in turns]
        raise fields.error(_prompt_field(fields), roles, "turns of which the last is the user's")
    if not turns[-1].content.strip():
        raise fields.error(_prompt_field(fields), turns[-1].content, "a last turn with some text")
    known = fields.has("prompt_id")
    prompt_id = fields.identifier("prompt_id") if known else make_prompt_id(turns)
    return Prompt(prompt_id, turns, _read_extra(fields))


def _prompt_field(fields: Fields) -> str:
    present = [name for name in (*_PROMPT_FIELDS, "chosen") if fields.has(name)]
    return present[0] if present else "prompt"


def _read_prompt_turns(fields: Fields) -> tuple[Turn, ...]:
    field = _prompt_field(fields)
    if field == "messages":
        turns = fields.turns("messages", "user")
        last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        return turns[: last + 1]
    if field == "instruction" and fields.text("input", ""):
        return (Turn("user", f"{fields.text('instruction')}\n\n{fields.text('input')}"),)
    return fields.turns(field, "user")


def _read_extra(fields: Fields) -> dict[str, Any]:
    """Return the record's other fields; what JSON cannot hold (an image, a NaN) is left out."""
    extra = fields.mapping("extra") | {
        name: value
        for name, value in fields.record.items()
        if name not in _STRUCTURE and value is not None
    }
    return {name: value for name, value in extra.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def _read_conversation(fields: Fields) -> tuple[Prompt, str]:
    """Return the prompt of a record and what the assistant should answer to it."""
    if fields.has("output_A"):
        preference = _read_preference(fields)
        return preference.prompt, preference.chosen.turns[0].content
    if fields.has("chosen"):
        prompt = _read_pair_prompt(fields)
        return prompt, _read_answer(fields, "chosen", prompt.turns).content
    target = next((name for name in _TARGET_FIELDS if fields.has(name)), None)
    if target and _prompt_field(fields) != "messages":
        prompt = _read_prompt(fields)
        return prompt, _read_answer(fields, target, prompt.turns).content
    if not fields.has("messages"):
        raise fields.error(
            "completion", None, f"one of {', '.join(_TARGET_FIELDS)}, chosen, messages"
        )
    turns = fields.turns("messages", "user")
    if turns[-1].role != "assistant":
        roles = [turn.role for turn in turns]
        raise fields.error("messages", roles, "turns of which the last is the assistant's")
    return _make_prompt(fields, turns[:-1]), turns[-1].content


def _read_preference(fields: Fields) -> Preference:
    if fields.has("output_A") or fields.record.get("type") == "pairwise_feedback":
        prompt = _read_prompt(fields)
        record = dict(fields.record) | {"prompt_id": prompt.prompt_id, "extra": dict(prompt.extra)}
        return preference_from_record(record, file=fields.file, line=fields.line)
    prompt = _read_pair_prompt(fields)
    chosen, rejected = (
        Completion((_read_answer(fields, name, prompt.turns),)) for name in ("chosen", "rejected")
    )
    return Preference(prompt, chosen, rejected)


def _read_judgement(fields: Fields) -> Judgement:
    target = next((name for name in _TARGET_FIELDS if fields.has(name)), None)
    if target is None:
        raise fields.error("completion", None, f"one of {', '.join(_TARGET_FIELDS)}, chosen")
    prompt = _read_prompt(fields)
    if fields.record.get("type") == "binary_feedback":
        record = dict(fields.record) | {"prompt_id": prompt.prompt_id, "extra": dict(prompt.extra)}
        return judgement_from_record(record, file=fields.file, line=fields.line)
    completion = Completion((_read_answer(fields, target, prompt.turns),))
    return Judgement(prompt, completion, fields.label())


def _read_pair_prompt(fields: Fields) -> Prompt:
    """Return the prompt of a chosen/rejected record, which TRL lets stand inside both outputs."""
    if fields.has("prompt") or fields.has("instruction") or fields.has("question"):
        return _read_prompt(fields)
    return _make_prompt(fields, fields.turns("chosen", "assistant")[:-1])


def _read_answer(fields: Fields, name: str, prompt: tuple[Turn, ...]) -> Turn:
    """Return the one assistant turn of a field that may repeat the prompt before it."""
    turns = fields.turns(name, "assistant")
    answer = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if [turn.role for turn in answer] != ["assistant"]:
        roles = [turn.role for turn in turns]
        raise fields.error(
            name, roles, "one turn of the assistant, alone or after the prompt's turns"
        )
    return answer[0]


def _check_same(fields: Fields, known: Prompt, prompt: Prompt) -> None:
    if known.turns != prompt.turns:
        raise fields.error(
            "prompt_id",
            prompt.prompt_id,
            "an id of its own (an earlier record has this id and another conversation); change it, "
            "or leave 'prompt_id' out of the records",
        )
