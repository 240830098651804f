"""Files are written whole or not at all; conversions are exact inverses."""

import dataclasses
import hashlib
import json
import os
import random
import stat

import numpy as np
import pytest

from halos_jax.data.records import formats as records
from halos_jax.data.records.formats import (
    RecordError,
    preference_from_record,
    preference_to_record,
    sample_from_record,
    sample_to_record,
    write_records,
)
from halos_jax.data.records.reading import read_records
from halos_jax.drawn import Drawn
from halos_jax.types import Completion, Judgement, Preference, Prompt, Sample, Turn

RECORDS = [{"a": 1, "b": "é\u2028x"}, {"a": [2, {"c": None}]}, {"a": "end"}]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def lines_of(values) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


# --------------------------------------------------------------------------- writing


def test_written_files_are_read_back_and_noted(tmp_path):
    path, noted = tmp_path / "out.jsonl", []
    write_records(path, iter(RECORDS), note=lambda *entry: noted.append(entry))
    assert [record for _, record in read_records(path)] == RECORDS
    data = path.read_bytes()
    assert noted == [(path, len(data), hashlib.sha256(data).hexdigest())]
    assert os.listdir(tmp_path) == ["out.jsonl"]
    assert "é" in path.read_text(encoding="utf-8")


def test_no_records_make_an_empty_file(tmp_path):
    write_records(tmp_path / "x", [])
    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": object()}, {"a": "\ud800"}])
def test_a_failing_write_leaves_the_old_file(tmp_path, bad):
    path = write(tmp_path / "x", b'{"old":1}\n')
    with pytest.raises(RecordError, match="line 2: cannot be written"):
        write_records(path, [{"a": 1}, bad])
    assert path.read_bytes() == b'{"old":1}\n' and os.listdir(tmp_path) == ["x"]


def test_the_file_is_synced_before_its_name_changes_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(source, target):
        events.append((os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(records.os, "fsync", record_sync)
    monkeypatch.setattr(records.os, "replace", record_replace)
    write_records(tmp_path / "x", RECORDS)
    assert events == ["file", ("x.partial", "x"), "folder"]


def test_a_full_disk_is_named_with_its_path(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*allowed.*x\.jsonl") as caught:
        write_records(tmp_path / "x.jsonl", RECORDS)
    assert caught.value.errno == 28 and os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/x"):
        write_records(tmp_path / "none" / "x", RECORDS)


# --------------------------------------------------------------------------- conversions

PROMPT = Prompt("p1", (Turn("system", "s"), Turn("user", "q\n é")), {"answer": "4", "n": [1, {}]})


def make_sample(**changes) -> Sample:
    values = {
        "prompt": PROMPT,
        "sample_id": 3,
        "output": " 4\n",
        "prompt_ids": (1, 2),
        "response_ids": (7, 8),
        "finish_reason": "length",
        "generator": "g",
        "reward": 0.1 + 0.2,
        "logps": (-0.1, -1e-30),
        "sum_logps": -0.1 - 1e-30,
        "mean_entropy": 0.7,
    }
    return Sample(**values | changes)


def make_preference(**changes) -> Preference:
    chosen = Completion((Turn("assistant", "yes"),), (5, 6), 1.5, 2, "stop", (-0.5, -1.25))
    rejected = Completion((Turn("assistant", "no"),), (7,), -0.25, 0, "length")
    return Preference(
        **{"prompt": PROMPT, "chosen": chosen, "rejected": rejected, "prompt_ids": (1, 2)} | changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": None, "logps": None},
        {"sum_logps": None, "mean_entropy": None},  # of a file from before these were kept
        {"prompt": Prompt("p", PROMPT.turns), "prompt_ids": (), "response_ids": (), "logps": ()},
    ],
)
def test_samples_survive_the_file(tmp_path, changes):
    sample = make_sample(**changes)
    record = sample_to_record(sample, "toy")
    assert record["type"] == "sample" and record["dataset"] == "toy"
    write_records(tmp_path / "x", [record])
    [(line, read)] = read_records(tmp_path / "x")
    assert sample_from_record(read, file="x", line=line) == sample


def test_a_sample_record_has_the_fields_of_halos():
    record = sample_to_record(make_sample())
    halos = {"output", "generator", "dataset", "prompt_id", "sample_id", "type", "prompt"}
    assert halos <= record.keys()
    bare = {name: record[name] for name in halos}
    assert sample_from_record(bare) == make_sample(
        prompt=Prompt("p1", PROMPT.turns),
        prompt_ids=(),
        response_ids=(),
        finish_reason="stop",
        reward=None,
        logps=None,
        sum_logps=None,
        mean_entropy=None,
    )
    instruction = bare | {"instruction": "q", "prompt": None}
    assert sample_from_record(instruction).prompt.turns == (Turn("user", "q"),)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output", 3),
        ("prompt_id", None),
        ("sample_id", "0"),
        ("type", "other"),
        ("prompt", []),
        ("prompt_ids", [1.5]),
        ("response_ids", {}),
        ("finish_reason", "eos"),
        ("reward", "high"),
        ("logps", [0.0]),
        ("sum_logps", "low"),
        ("mean_entropy", []),
        ("generator", 1),
        ("extra", 3),
    ],
)
def test_bad_sample_fields_are_named(field, value):
    record = sample_to_record(make_sample()) | {field: value}
    with pytest.raises(RecordError, match=f"s.jsonl line 4: field '{field}': got "):
        sample_from_record(record, file="s.jsonl", line=4)


@pytest.mark.parametrize("round", range(8))
def test_preferences_survive_the_file_whatever_the_order_of_a_and_b(tmp_path, round):
    preference = make_preference()
    record = preference_to_record(preference, seed=1, round=round, split="train")
    write_records(tmp_path / "x", [record])
    [(_, read)] = read_records(tmp_path / "x")
    assert preference_from_record(read) == preference
    better = "A" if record["label"] == 1 else "B"
    assert record[f"output_{better}"] == [{"role": "assistant", "content": "yes"}]
    assert record[f"reward_{better}"] == 1.5 and record["reward_difference"] == 1.75
    assert record["split"] == "train" and record["type"] == "pairwise_feedback"


def test_the_weight_of_a_pair_survives_and_is_above_0():
    weighed = dataclasses.replace(make_preference(), weight=0.75)
    record = preference_to_record(weighed)
    assert record["weight"] == 0.75 and preference_from_record(record) == weighed
    assert "weight" not in preference_to_record(make_preference())
    for weight in (0, -1.0, "2"):
        with pytest.raises(RecordError, match="line 3: field 'weight': got "):
            preference_from_record(record | {"weight": weight}, file="f", line=3)


def test_a_preference_of_texts_alone_survives():
    plain = make_preference(
        prompt_ids=(),
        chosen=Completion((Turn("assistant", "yes"),)),
        rejected=Completion((Turn("assistant", "no"),)),
    )
    record = preference_to_record(plain)
    assert preference_from_record(record) == plain
    assert not {"reward_A", "ids_A", "sample_id_A", "reward_difference"} & record.keys()


def test_which_output_is_a_is_a_fair_coin_of_the_pair_alone():
    def is_swapped(preference: Preference, **where) -> int:
        return preference_to_record(preference, **where)["sample_id_A"]

    base = make_preference()
    reverse = make_preference(chosen=base.rejected, rejected=base.chosen)
    labels, first = [], []
    for index in range(2000):
        preference = make_preference(prompt=Prompt(f"p{index}", PROMPT.turns))
        labels.append(preference_to_record(preference, seed=5, round=1)["label"])
        first.append(is_swapped(base, seed=index, round=1))
        # Which of the two is better must not move the coin, or the position would tell the label.
        assert is_swapped(base, seed=index, round=1) == is_swapped(reverse, seed=index, round=1)
    # 2000 fair coins: 1000 +- 22.4; five deviations.
    assert abs(sum(labels) - 1000) < 112
    assert abs(sum(identity == 0 for identity in first) - 1000) < 112
    by_round = [is_swapped(base, seed=0, round=index) for index in range(64)]
    assert len(set(by_round)) == 2


def test_the_coin_does_not_depend_on_what_was_written_before():
    preferences = [make_preference(prompt=Prompt(f"p{i}", PROMPT.turns)) for i in range(50)]
    expected = {p.prompt.prompt_id: preference_to_record(p, seed=3, round=2) for p in preferences}
    random.Random(0).shuffle(preferences)
    for preference in preferences:
        record = preference_to_record(preference, seed=3, round=2)
        assert record == expected[preference.prompt.prompt_id]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", 2),
        ("label", None),
        ("output_A", "x\ud800"),
        ("output_A", [{"role": "user", "content": "x"}]),
        ("output_B", [{"role": "assistant", "content": "x"}] * 2),
        ("reward_A", [1]),
        ("ids_B", ["1"]),
        ("sample_id_A", "0"),
        ("finish_reason_B", "?"),
        ("prompt_ids", 1),
        ("type", "binary_feedback"),
        ("prompt", None),
    ],
)
def test_bad_preference_fields_are_named(field, value):
    record = preference_to_record(make_preference()) | {field: value}
    with pytest.raises(RecordError, match=f"f line 9: field '{field}': got "):
        preference_from_record(record, file="f", line=9)


def test_ids_of_conversations_tell_roles_and_boundaries_apart():
    conversations = [
        (Turn("user", "ab"),),
        (Turn("system", "ab"),),
        (Turn("user", "a"), Turn("user", "b")),
        (Turn("user", "a"), Turn("assistant", "b")),
        (Turn("user", 'a"], ["user", "b'),),
    ]
    ids = {records.make_prompt_id(turns) for turns in conversations}
    assert len(ids) == len(conversations)
    expected = hashlib.sha256(b'[[["user", "ab"]]]').hexdigest()
    assert records.make_prompt_id(conversations[0]) == expected


# --------------------------------------------------------------------------- other feedback


def make_judgement(**changes) -> Judgement:
    completion = Completion(
        (Turn("assistant", "yes"),), ids=(4, 5), reward=-0.25, sample_id=3, finish_reason="length"
    )
    prompt = Prompt("p1", (Turn("system", "s"), Turn("user", "q")), {"answer": "4"})
    values = {"completion": completion, "desirable": True, "prompt_ids": (1, 2)} | changes
    return Judgement(prompt, **values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"desirable": False, "prompt_ids": ()},
        {"completion": Completion((Turn("assistant", "text alone"),))},
    ],
)
def test_judgements_survive_the_file(tmp_path, changes):
    judgement = make_judgement(**changes)
    write_records(tmp_path / "f", [records.judgement_to_record(judgement)])
    [(line, record)] = read_records(tmp_path / "f")
    assert records.judgement_from_record(record, file="f", line=line) == judgement


def test_feedback_is_read_by_the_type_that_its_record_names():
    sample = make_sample(reward=0.5)
    for feedback, record in (
        (make_preference(), preference_to_record(make_preference())),
        (make_judgement(), records.judgement_to_record(make_judgement())),
        (sample, sample_to_record(sample, type="scalar_feedback")),
    ):
        assert records.feedback_from_record(record) == feedback


def test_a_judgement_record_has_the_fields_of_halos():
    record = records.judgement_to_record(make_judgement())
    assert record["type"] == "binary_feedback" and record["label"] == 1
    assert record["output"] == [{"role": "assistant", "content": "yes"}]
    assert record["prompt"][1] == {"role": "user", "content": "q"}
    assert record["reward"] == -0.25 and record["prompt_id"] == "p1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", 2),
        ("label", None),
        ("output", []),
        ("output", [{"role": "user", "content": "no"}]),
        ("type", "sample"),
        ("response_ids", "4"),
        ("prompt_id", ""),
        ("reward", "high"),
    ],
)
def test_bad_judgement_fields_are_named(field, value):
    record = records.judgement_to_record(make_judgement()) | {field: value}
    with pytest.raises(RecordError, match=f"f line 9: field '{field}': got"):
        records.judgement_from_record(record, file="f", line=9)


def test_scalar_feedback_is_a_scored_sample_by_its_type():
    sample = make_sample(reward=1.5)
    record = records.sample_to_record(sample, type="scalar_feedback")
    assert record["type"] == "scalar_feedback"
    assert record == records.sample_to_record(sample) | {"type": "scalar_feedback"}
    assert records.sample_from_record(record) == sample


# 6 of {3, 6}, and 7 for sure
DRAWN = Drawn(0.7, (-0.25, 0.0), (2, 1), np.array([3, 6, 7], "<i4").tobytes())


def make_drawn(drawn):
    return Sample(Prompt("p", (Turn("user", "q"),)), 0, "", (5,), (6, 7), "stop", drawn=drawn)


@pytest.mark.parametrize("drawn", [None, DRAWN, Drawn(1.3, (-0.5, -2.0))])
@pytest.mark.parametrize("kind", ["sample", "scalar_feedback"])
def test_what_tokens_were_drawn_from_is_read_back(drawn, kind):
    record = json.loads(json.dumps(sample_to_record(make_drawn(drawn), type=kind)))
    assert ("drawn" in record) == (drawn is not None)
    assert sample_from_record(record) == make_drawn(drawn)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"temperature": 0}, "field 'temperature': got 0"),
        ({"logps": [-1.0]}, "field 'logps': got '1 numbers', allowed: one for each response id"),
        ({"kept_counts": [2]}, "field 'kept_counts': got '1 numbers, 2 in all', allowed: one of 1"),
        ({"kept_counts": [1, 2]}, "field 'kept_ids': .* which is among them"),
        ({"kept_ids": "AwA"}, "field 'kept_ids': got 'AwA', allowed: little-endian int32"),
        ({"kept_ids": "AwAAAAYA"}, ".*little-endian int32 in base64"),  # 1.5 ids
        ({"kept": [1], "top_p": None}, r"got \['kept'\], allowed: temperature, logps, kept_counts"),
    ],
)
def test_a_set_that_no_token_can_have_been_drawn_from_is_refused(change, error):
    record = sample_to_record(make_drawn(DRAWN))
    record["drawn"] |= change
    with pytest.raises(RecordError, match="x.jsonl line 4: field 'drawn': " + error):
        sample_from_record(record, file="x.jsonl", line=4)


@pytest.mark.parametrize("ids", [(6, 3, 7), (6, 6, 7), (-1, 6, 7), (3, 5, 7)])
def test_a_set_has_ascending_ids_with_the_token_among_them(ids):
    drawn = dataclasses.replace(DRAWN, kept_ids=np.array(ids, "<i4").tobytes())
    with pytest.raises(RecordError, match="ascending ids of 0 or more"):
        sample_from_record(sample_to_record(make_drawn(drawn)))
