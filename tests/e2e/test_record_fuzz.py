"""Records with something wrong in them: one error with its place, or read whole; never a traceback.

What is accepted is held against the parser of the standard library: every text of the record stands
in what was read, or its field is named as not read, and every number is what the record says.
"""

import collections
import copy
import json
import logging
import random
import re

import pytest

from halos_jax.data import datasets
from halos_jax.data.records.fields import RecordError
from halos_jax.types import Demonstration, Judgement, Preference, Prompt, Sample

MUTATIONS = 10_000

TOOLS = [{"type": "function", "function": {"name": "toolname", "parameters": {"k": "schema"}}}]
CALL = {"type": "function", "function": {"name": "callname", "arguments": {"k": "argument"}}}
CHAT = [
    {"role": "system", "content": "sys text"},
    {"role": "user", "content": "asked text"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "tool text", "tool_call_id": "id7", "name": "toolname"},
    {"role": "assistant", "content": "said text", "reasoning_content": "thought text"},
]
OUTPUTS = {"output_A": CHAT[4:], "output_B": [{"role": "assistant", "content": "other text"}]}
SAMPLE = {"type": "scalar_feedback", "prompt_id": "pid", "sample_id": 3, "output": "out text"}
SAMPLE |= {"prompt": "prompt text", "reward": 0.5, "prompt_ids": [1, 2], "response_ids": [3]}
SHARED = {"from": "gpt", "value": "shared text"}
RECORDS = {
    datasets.load_prompts: [
        {"prompt": "prompt text", "label": "label text", "type": "math", "n": [1, {"a": "deep"}]},
        {"messages": CHAT, "tools": TOOLS, "answer": "answer text"},
        {"instruction": "prompt text", "input": "input text", "output": "out text"},
        {"conversations": [{"from": "human", "value": "asked text"}, SHARED], "system": "sys text"},
    ],
    datasets.load_demonstrations: [
        {"messages": CHAT, "tools": TOOLS, "source": "source text"},
        {"instruction": "prompt text", "context": "context text", "response": "response text"},
        {"query": "prompt text", "response": "out text", "history": [["old text", "past text"]]},
        {"conversations": [{"from": "human", "value": "asked text"}, SHARED], "system": "sys text"},
        {"text": "plain text", "meta": {"url": "url text"}},
        {"problem": "prompt text", "solution": "solution text"},
    ],
    datasets.load_preferences: [
        {"prompt": "prompt text", "chosen": "chosen text", "rejected": "bad text", "margin": 1.5},
        {"system": "sys text", "question": "q text", "chosen": "c text", "rejected": "r text"}
        | {"score_chosen": 4, "score_rejected": 2.5},
        {"type": "pairwise_feedback", "prompt": CHAT[1:2], "label": 1, **OUTPUTS}
        | {"reward_A": 1.0, "reward_B": 0.5},
        {"chosen": CHAT[1:2] + CHAT[4:], "rejected": [CHAT[1], OUTPUTS["output_B"][0]]},
    ],
    datasets.load_judgements: [
        {"prompt": "prompt text", "completion": "said text", "label": True, "extra": {"a": "b"}},
        {"type": "binary_feedback", "prompt_id": 7, "prompt": CHAT[1:2], "output": CHAT[4:]}
        | {"label": 0},
    ],
    datasets.load_scored: [SAMPLE, SAMPLE | {"logps": [-0.5], "generator": "model text"}],
}
ODD = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e39, "", " ", "7", "odd text"]
ODD += [[], {}, [[]], [None], {"a": "odd text"}, ["odd text"], [{"role": "user"}], "\ud800", "[{"]
ODD += [float("nan"), float("inf")]
# What JSON text may say that no value of Python says.
RAW = ["NaN", "1e999", "9" * 5000, "[" * 70 + "]" * 70, "[" * 40_000, '"\\udfff"', "{'a': 1}"]
RAW += ['{"k": 1, "k": 2}', "01", '"\x01"', "-", "tru", '{"a": ' * 40_000]
NAMES = ["prompt", "chosen", "label", "weight", "train", "role", "content", "from", "value"]
NAMES += ["tools", "name", "id", "system", "margin"]


def list_places(value, path=()):
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else pairs:
        yield from list_places(item, (*path, key))


def mutate(record, draw):
    """Return the text of a record in which one to three things are not as they were."""
    record = copy.deepcopy(record)
    raw = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.choice([path for path in list_places(record) if path] or [()])
        if not place:
            break
        holder = record
        for key in place[:-1]:
            holder = holder[key]
        kind, key = draw.randrange(6), place[-1]
        if kind == 0 and isinstance(holder, dict):
            holder[draw.choice(NAMES)] = holder.pop(key)
        elif kind == 1:
            del holder[key]
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
        elif kind == 3:
            mark = f"RAW{len(raw)}"
            raw[mark], holder[key] = draw.choice(RAW), mark
        elif kind == 4 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(draw.choice([*holder, *ODD])))
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
    text = json.dumps(record)
    for mark, spelled in raw.items():
        text = text.replace(f'"{mark}"', spelled)
    data = text.encode()
    if draw.random() < 0.25:  # bytes, too
        at, other = draw.randrange(len(data)), draw.randrange(256)
        data = draw.choice(
            (data[:at], data[:at] + bytes([other]) + data[at + 1 :], data[:at] + data[at + 1 :])
        )
    return data.replace(b"\n", b" ").replace(b"\r", b" ")


def list_texts(value, field=""):
    """Yield (field, text) of every text in a record, with the keys of objects inside of lists."""
    if isinstance(value, str):
        yield field, value
    for key, item in value.items() if isinstance(value, dict) else ():
        inside = f"{field}[].{key}" if field else key
        yield from list_texts(item, inside if field.count("[].") < 1 else field)
    for item in value if isinstance(value, list) else ():
        yield from list_texts(item, field)


def show(found):
    """Return all texts of what was read, and its numbers by name."""
    prompt = found if isinstance(found, Prompt) else found.prompt
    turns, numbers = list(prompt.turns), {}
    if isinstance(found, Preference):
        turns += [*found.chosen.turns, *found.rejected.turns]
        numbers = {"chosen": found.chosen.reward, "rejected": found.rejected.reward}
    elif isinstance(found, (Demonstration, Judgement)):
        turns += found.completion.turns
        numbers = {"label": getattr(found, "desirable", None)}
    texts = [text for turn in turns for text in (turn.content, *list_all(turn.further))]
    texts += list_all(json.dumps(dict(prompt.extra)))
    if isinstance(found, Sample):
        texts += [found.output, found.generator]
        numbers = {"reward": found.reward, "ids": found.response_ids, "sample": found.sample_id}
    return texts, numbers


def list_all(text):
    return [one for _, one in list_texts(json.loads(text))] if text else []


# Names of formats, roles and ids, which decide how a record is read, and are no text of it.
NO_TEXT = {"type", "prompt_id", "finish_reason", "role", "from", "generator"}


def check_whole(record, found, unread):
    """Raise AssertionError where a text of the record is neither read nor said not to be."""
    texts, numbers = show(found)
    joined = "\n\n".join(texts)
    for field, text in list_texts(record):
        head, _, key = field.partition("[].")
        known = NO_TEXT & {head, key.partition("[]")[0], field.rpartition(".")[2]}
        said = unread & {
            head,
            field,
            f"{head}[].{key.partition('[]')[0]}",
            f"{head}[behind-the-question]",
        }
        parsed = [one for one in list_any(text) if one not in joined]
        assert text in joined or known or said or (list_any(text) and not parsed), (field, text)
    if numbers.get("label") is not None and "label" in record:
        assert type(record["label"]) in (bool, int, float)
        assert numbers["label"] == (record["label"] == 1)
    for name, value in numbers.items():
        assert value is None or name in ("label", "ids") or type(value) in (float, int), name
    if isinstance(found, Sample):
        assert list(numbers["ids"]) == (record.get("response_ids") or [])
        assert numbers["reward"] == record["reward"] and type(record["reward"]) is not bool
        assert numbers["sample"] == record["sample_id"]
    scores = record.get("score_chosen"), record.get("score_rejected")
    if isinstance(found, Preference) and None not in scores and "output_A" not in record:
        assert (numbers["chosen"], numbers["rejected"]) == tuple(map(float, scores))


def list_any(text):
    """Return the texts of a text that is JSON itself, as tools in tables are."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [one for _, one in list_texts(value)]


def read_one(load, path, caplog):
    """Return what a loader makes of the second line of a file, and what it says is not read."""
    caplog.clear()
    found = load(str(path))
    said = [one for one in caplog.messages if "not read" in one]
    unread = {name for one in said for name in re.findall(r"([^ ,:;]+) \(\d+\)", one)}
    return found, unread


def is_nothing(record, load):
    """Say whether a record may be read without leaving anything: no weight, no reward."""
    turns = [one for one in record.values() if isinstance(one, list)]
    weights = [turn for one in turns for turn in one if isinstance(turn, dict)]
    return any({"weight", "train", "loss"} & turn.keys() for turn in weights) or (
        load is datasets.load_scored and record.get("reward") is None
    )


@pytest.mark.slow
def test_mutated_records_are_refused_with_their_place_or_read_whole(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    draw = random.Random(11)
    counts, path = collections.Counter(), tmp_path / "data.jsonl"
    pairs = [(load, record) for load, records in RECORDS.items() for record in records]
    for number in range(MUTATIONS):
        load, record = pairs[number % len(pairs)]
        line = mutate(record, draw)
        path.write_bytes(b"\n" + line + b"\n")
        try:
            found, unread = read_one(load, path, caplog)
        except RecordError as error:
            assert str(error).startswith(str(path)), (line, error)
            placed = f"{path} line 2: " in str(error)
            assert placed or "got no records" in str(error) or "nothing to train" in str(error), (
                line[:300],
                error,
            )
            counts["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{load.__name__}: {line[:500]!r}: {error!r}") from error
        parsed = json.loads(line)
        if is_nothing(parsed, load):
            counts["accepted in part: weights"] += 1
            continue
        assert found, line
        try:
            for one in found[:1]:
                check_whole(parsed, one, unread)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{load.__name__}: {line[:900]!r}: {error!r}") from error
        counts["accepted"] += 1
    print(f"{MUTATIONS} mutations of records: {dict(counts)}; 0 raw, 0 dropped, 0 wrong types")
    assert counts["accepted"] > 1000 and counts["refused"] > 3000
