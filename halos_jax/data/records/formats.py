"""Records on disk: durable writing, and the conversions to and from the package's types.

The formats are those of HALOs (sample, three kinds of feedback), with token ids and finish reasons
added so that training sees the very tokens that were sampled. Files are written as JSON Lines.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from halos_jax.config.field_names import SAMPLE_TYPES, list_format
from halos_jax.data.records.fields import Fields, RecordError
from halos_jax.data.records.json_door import find_faults
from halos_jax.data.records.turns import (
    add_context,
    read_context,
    read_turns,
    refuse_unlearned,
    turns_to_record,
)
from halos_jax.drawn import Drawn
from halos_jax.json_text import JsonObject
from halos_jax.storage import Note, replace_file
from halos_jax.types import (
    FINISH_LENGTH,
    FINISH_STOP,
    Completion,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)


def digest(*parts: Any) -> str:
    """Return the sha256 (hex) of JSON-like `parts`; no two lists of parts share an encoding."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_prompt_id(turns: Sequence[Turn]) -> str:
    """Return the id of a conversation that has none: the sha256 of its turns."""
    return digest([_list_parts(turn) for turn in turns])


def _list_parts(turn: Turn) -> list[str]:
    # Further keys only if there are any, so that plain conversations keep the ids of older files.
    return [turn.role, turn.content, *((turn.further,) if turn.further else ())]


# --------------------------------------------------------------------------- files


def write_records(
    path: str | os.PathLike[str],
    records: Iterable[Mapping[str, Any]],
    *,
    note: Note | None = None,
) -> None:
    """Write records as JSON Lines; at any instant `path` is absent, as before, or whole.

    They are written by `storage.replace_file`, which calls `note`.

    Raises:
      RecordError: if a record is not JSON (a NaN, say).
      OSError: if the folder cannot be written, with the path in the message.
    """
    file = os.fspath(path)
    try:
        with replace_file(file, note=note) as stream:
            for number, record in enumerate(records, start=1):
                stream.write(_dump(file, number, record))
    except OSError as error:
        reason = f"cannot write ({error.strerror}); allowed: a writable folder with free space"
        raise OSError(error.errno, reason, file) from error


def _dump(file: str, number: int, record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise RecordError(f"{file} line {number}: cannot be written as JSON: {error}") from error


# --------------------------------------------------------------------------- conversions


def sample_to_record(sample: Sample, dataset: str = "", *, type: str = "sample") -> JsonObject:
    """Return HALOs' sample record with token ids; `sample_from_record` inverts it.

    A sample with a reward is feedback if `type` is "scalar_feedback".
    """
    record = {
        "output": sample.output,
        "generator": sample.generator,
        "dataset": dataset,
        "prompt_id": sample.prompt.prompt_id,
        "sample_id": int(sample.sample_id),
        "type": type,
        "prompt": turns_to_record(sample.prompt.turns),
        "prompt_ids": [int(token) for token in sample.prompt_ids],
        "response_ids": [int(token) for token in sample.response_ids],
        "finish_reason": sample.finish_reason,
    }
    if sample.reward is not None:
        record["reward"] = float(sample.reward)
    if sample.logps is not None:
        record["logps"] = [float(value) for value in sample.logps]
    if sample.sum_logps is not None:
        record["sum_logps"] = float(sample.sum_logps)
    if sample.mean_entropy is not None:
        record["mean_entropy"] = float(sample.mean_entropy)
    if sample.drawn is not None:
        record["drawn"] = _drawn_to_record(sample.drawn)
    return record | _rest_to_record(sample.prompt)


def _drawn_to_record(drawn: Drawn) -> JsonObject:
    record: JsonObject = {"temperature": drawn.temperature, "logps": list(drawn.logps)}
    if drawn.kept_counts:
        record["kept_counts"] = list(drawn.kept_counts)
        record["kept_ids"] = base64.b64encode(drawn.kept_ids).decode()
    return record


def sample_from_record(record: Mapping[str, Any], *, file: str = "record", line: int = 0) -> Sample:
    """Make the Sample of a sample record, checking every field (`file`, `line`: for errors)."""
    fields = Fields(record, file, line)
    return read_sample(fields, _read_prompt(fields))


def read_sample(fields: Fields, prompt: Prompt) -> Sample:
    """Make the Sample of a sample record whose prompt is known.

    The record's other fields become the prompt's `extra`.
    """
    fields.choice("type", SAMPLE_TYPES, "sample")
    response_ids = fields.ids("response_ids")
    logps = _read_logps(fields, "logps", response_ids)
    sample = Sample(
        prompt=prompt,
        sample_id=fields.integer("sample_id"),
        output=fields.text("output"),
        prompt_ids=fields.ids("prompt_ids"),
        response_ids=response_ids,
        finish_reason=fields.choice("finish_reason", (FINISH_STOP, FINISH_LENGTH), FINISH_STOP),
        generator=fields.text("generator", ""),
        reward=fields.number("reward"),
        logps=logps,
        sum_logps=fields.number("sum_logps"),
        mean_entropy=fields.number("mean_entropy"),
        drawn=_read_drawn(fields, response_ids) if fields.has("drawn") else None,
    )
    extra = read_extra(fields, fields.used - {"extra"})
    return dataclasses.replace(sample, prompt=dataclasses.replace(prompt, extra=extra))


def _read_drawn(outer: Fields, response: Sequence[int]) -> Drawn:
    """Read what a response's tokens were drawn from, and check that they can have been."""
    fields = Fields(outer.mapping("drawn"), f"{outer.place}: field 'drawn'", texts=outer.texts)
    heat, logps = fields.number("temperature"), fields.numbers("logps")
    if heat is None or heat <= 0:
        raise fields.error("temperature", heat, "a number above 0")
    if logps is None or len(logps) != len(response):
        got = None if logps is None else f"{len(logps)} numbers"
        raise fields.error("logps", got, f"one for each response id ({len(response)})")
    counts, text = fields.ids("kept_counts"), fields.text("kept_ids", "")
    # A misspelt set would read as a draw from all tokens.
    if other := [name for name in sorted(fields.record.keys() - fields.used) if fields.has(name)]:
        raise outer.error("drawn", other, "temperature, logps, kept_counts, kept_ids")
    try:
        packed = base64.b64decode(text, validate=True)
        ids = np.frombuffer(packed, "<i4")
    except (binascii.Error, ValueError) as error:
        raise fields.error("kept_ids", text, "little-endian int32 in base64") from error
    if not (counts or len(ids)):
        return Drawn(heat, logps)
    if len(counts) != len(response) or 0 in counts or sum(counts) != len(ids):
        allowed = f"one of 1 or more for each response id ({len(response)}), {len(ids)} in all"
        raise fields.error("kept_counts", f"{len(counts)} numbers, {sum(counts)} in all", allowed)
    starts = np.cumsum([0, *counts[:-1]])
    rises = np.diff(ids, prepend=np.int32(-1)) > 0
    rises[starts] = ids[starts] >= 0
    held = np.add.reduceat(ids == np.repeat(np.array(response), counts), starts)
    if not (rises.all() and held.all()):
        allowed = "ascending ids of 0 or more for each response id, which is among them"
        raise fields.error("kept_ids", "other ones", allowed)
    return Drawn(heat, logps, counts, packed)


def read_extra(fields: Fields, hidden: Iterable[str]) -> JsonObject:
    """Return the fields of a record, whatever their names, except those that are `hidden`.

    Records of HALOs' types hold them in `extra`; a field of that name in other records is merged
    with the rest. Values that JSON cannot hold (an image, a NaN of a table) are left out.
    """
    own = list_format(fields.peek("type"))
    hidden = {*hidden, *own}
    extra = {
        name: value
        for name, value in fields.record.items()
        if name not in hidden and value is not None
    }
    inner = fields.mapping("extra") if own else fields.peek("extra")
    if isinstance(inner, dict):
        extra = extra | inner if own else inner | extra
    fields.used.update(fields.record)
    faults = {name for name, value in extra.items() if next(find_faults(value), None)}
    fields.leave(f"{name} (no JSON value)" for name in faults)
    return {name: value for name, value in extra.items() if name not in faults}


def preference_to_record(
    preference: Preference, *, seed: int = 0, round: int = 0, split: str = ""
) -> JsonObject:
    """Return the HALOs pairwise_feedback record; `preference_from_record` inverts it.

    Whether A or B is the chosen output is a fair coin, which depends on (seed, round, prompt id,
    the pair) alone: not on the order of the two, nor on which was chosen.
    """
    pair = (preference.chosen, preference.rejected)
    names = sorted(_completion_key(completion) for completion in pair)
    swapped = int(digest("swap", seed, round, preference.prompt.prompt_id, names)[:8], 16) % 2 == 1
    first, second = sorted(pair, key=_completion_key, reverse=swapped)
    record: JsonObject = {"type": "pairwise_feedback"} | ({"split": split} if split else {})
    record |= {
        "prompt_id": preference.prompt.prompt_id,
        "prompt": turns_to_record(preference.prompt.turns),
        "output_A": turns_to_record(first.turns),
        "output_B": turns_to_record(second.turns),
        "label": int(first is preference.chosen),
    }
    if first.reward is not None and second.reward is not None:
        record["reward_difference"] = abs(float(first.reward) - float(second.reward))
    if preference.weight != 1:
        record["weight"] = float(preference.weight)
    if preference.prompt_ids:
        record["prompt_ids"] = [int(token) for token in preference.prompt_ids]
    for letter, completion in (("A", first), ("B", second)):
        if completion.reward is not None:
            record[f"reward_{letter}"] = float(completion.reward)
        if completion.ids:
            record[f"ids_{letter}"] = [int(token) for token in completion.ids]
        if completion.sample_id is not None:
            record[f"sample_id_{letter}"] = int(completion.sample_id)
        record[f"finish_reason_{letter}"] = completion.finish_reason
        if completion.logps is not None:
            record[f"logps_{letter}"] = [float(value) for value in completion.logps]
    return record | _rest_to_record(preference.prompt)


def preference_from_record(
    record: Mapping[str, Any], *, file: str = "record", line: int = 0
) -> Preference:
    """Make the Preference of a pairwise_feedback record, checking every field."""
    fields = Fields(record, file, line)
    return read_pairwise(fields, _read_prompt(fields))


def read_pairwise(fields: Fields, prompt: Prompt) -> Preference:
    """Make the Preference of a pairwise_feedback record whose prompt is known."""
    fields.choice("type", ("pairwise_feedback",), "pairwise_feedback")
    label = fields.label()
    first, second = _read_completion(fields, "A"), _read_completion(fields, "B")
    chosen, rejected = (first, second) if label else (second, first)
    if (first.reward is None) != (second.reward is None):
        missing = "reward_A" if first.reward is None else "reward_B"
        raise fields.error(missing, None, "a number, since the other output has one; or neither")
    if first.reward is None and fields.has("reward_difference"):
        chosen = dataclasses.replace(chosen, reward=fields.number("reward_difference"))
        rejected = dataclasses.replace(rejected, reward=0.0)
    weight = fields.number("weight")
    if weight is not None and weight <= 0:
        raise fields.error("weight", weight, "a number above 0, or none: 1")
    return Preference(prompt, chosen, rejected, fields.ids("prompt_ids"), weight or 1.0)


def judgement_to_record(judgement: Judgement) -> JsonObject:
    """Return the HALOs binary_feedback record; `judgement_from_record` inverts it."""
    completion = judgement.completion
    record: JsonObject = {
        "type": "binary_feedback",
        "prompt_id": judgement.prompt.prompt_id,
        "prompt": turns_to_record(judgement.prompt.turns),
        "output": turns_to_record(completion.turns),
        "label": int(judgement.desirable),
        "finish_reason": completion.finish_reason,
    }
    if judgement.prompt_ids:
        record["prompt_ids"] = [int(token) for token in judgement.prompt_ids]
    if completion.reward is not None:
        record["reward"] = float(completion.reward)
    if completion.ids:
        record["response_ids"] = [int(token) for token in completion.ids]
    if completion.sample_id is not None:
        record["sample_id"] = int(completion.sample_id)
    return record | _rest_to_record(judgement.prompt)


def judgement_from_record(
    record: Mapping[str, Any], *, file: str = "record", line: int = 0
) -> Judgement:
    """Make the Judgement of a binary_feedback record, checking every field."""
    fields = Fields(record, file, line)
    return read_binary(fields, _read_prompt(fields))


def read_binary(fields: Fields, prompt: Prompt) -> Judgement:
    """Make the Judgement of a binary_feedback record whose prompt is known."""
    fields.choice("type", ("binary_feedback",), "binary_feedback")
    turns = read_turns(fields, "output", "assistant")
    if [turn.role for turn in turns] != ["assistant"]:
        raise fields.error("output", [turn.role for turn in turns], "one turn of the assistant")
    refuse_unlearned(fields, "output", turns[0])
    completion = Completion(
        turns=turns,
        ids=fields.ids("response_ids"),
        reward=fields.number("reward"),
        sample_id=fields.integer("sample_id") if fields.has("sample_id") else None,
        finish_reason=fields.choice("finish_reason", (FINISH_STOP, FINISH_LENGTH), FINISH_STOP),
    )
    return Judgement(prompt, completion, fields.label(), fields.ids("prompt_ids"))


def feedback_from_record(record: Mapping[str, Any]) -> Preference | Judgement | Sample:
    """Make the pair, judgement or sample of a feedback record, as its "type" says."""
    if record["type"] == "pairwise_feedback":
        return preference_from_record(record)
    if record["type"] == "binary_feedback":
        return judgement_from_record(record)
    return sample_from_record(record)


def _read_prompt(fields: Fields) -> Prompt:
    name = "prompt" if fields.has("prompt") or not fields.has("instruction") else "instruction"
    turns = add_context(read_turns(fields, name, "user"), read_context(fields))
    number = fields.integer("prompt_pass") if fields.has("prompt_pass") else 1
    prompt_id, extra = fields.identifier("prompt_id"), fields.mapping("extra")
    return Prompt(prompt_id, turns, extra, fields.place, number)


def _read_completion(fields: Fields, letter: str) -> Completion:
    name = f"output_{letter}"
    turns = read_turns(fields, name, "assistant")
    if [turn.role for turn in turns] != ["assistant"]:
        raise fields.error(name, [turn.role for turn in turns], "one turn of the assistant")
    refuse_unlearned(fields, name, turns[0])
    identified = fields.has(f"sample_id_{letter}")
    ids = fields.ids(f"ids_{letter}")
    return Completion(
        turns=turns,
        ids=ids,
        reward=fields.number(f"reward_{letter}"),
        sample_id=fields.integer(f"sample_id_{letter}") if identified else None,
        finish_reason=fields.choice(
            f"finish_reason_{letter}", (FINISH_STOP, FINISH_LENGTH), FINISH_STOP
        ),
        logps=_read_logps(fields, f"logps_{letter}", ids),
    )


def _read_logps(fields: Fields, name: str, ids: Sequence[int]) -> tuple[float, ...] | None:
    """Read the log-probabilities of a response's tokens, one each."""
    logps = fields.numbers(name)
    if logps is not None and len(logps) != len(ids):
        allowed = f"one for each response id ({len(ids)})"
        raise fields.error(name, f"{len(logps)} numbers", allowed)
    return logps


def _completion_key(completion: Completion) -> str:
    """Identify a completion by its sample id, or else by its text."""
    if completion.sample_id is not None:
        return f"{completion.sample_id:012d}"
    return digest([_list_parts(turn) for turn in completion.turns])


def _rest_to_record(prompt: Prompt) -> JsonObject:
    """Return what a record says of a prompt where there is anything to say."""
    again = {"prompt_pass": prompt.pass_number} if prompt.pass_number > 1 else {}
    return again | ({"extra": dict(prompt.extra)} if prompt.extra else {})
