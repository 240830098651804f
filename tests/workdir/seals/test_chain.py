"""The chain of manifests: what a digest is of, and what it is not of."""

import dataclasses
import hashlib
import json

import pytest

from halos_jax.config import Config, ModelConfig, OptimizerConfig, SamplingConfig
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import FileRecord, Manifest
from halos_jax.workdir.seals import chain, defaults

WHOLE = Manifest(
    round=1,
    stages=("sample",),
    files={"samples.jsonl": FileRecord("ab", 3)},
    metrics={"samples": 3, "reward_eval": 0.5},
    decisions={"best": {"round": 1}},
)
FACTS = {"config": "c", "inputs": {}, "rows": {"count": 0, "sha256": ""}, "checkpoint": "k"}


@pytest.fixture
def sealed():
    return chain.seal(WHOLE, "before", FACTS)


def test_a_sealed_manifest_holds_and_is_the_same_each_time(sealed):
    assert chain.find_broken(sealed, "before") == []
    assert sealed == chain.seal(WHOLE, "before", FACTS)
    again = json.loads(json.dumps(dataclasses.asdict(sealed)))
    assert again["chain"] == sealed.chain


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"samples": 3, "reward_eval": 0.6}},
        {"metrics": {"samples": 3}},
        {"files": {"samples.jsonl": FileRecord("ac", 3)}},
        {"decisions": {"best": {"round": 0}}},
        {"start": 5},
        {"policy": "sft"},
    ],
)
def test_whatever_is_changed_breaks_it(sealed, change):
    assert chain.find_broken(dataclasses.replace(sealed, **change), "before") == [
        "its digest is not that of its content"
    ]


@pytest.mark.parametrize("name", ["config", "inputs", "rows", "checkpoint"])
def test_its_facts_are_part_of_it(sealed, name):
    edited = dataclasses.replace(sealed, chain={**sealed.chain, name: "other"})
    assert chain.find_broken(edited) == ["its digest is not that of its content"]


def test_another_predecessor_is_named(sealed):
    assert chain.find_broken(sealed, "other") == ["it follows before..., not other..."]
    edited = dataclasses.replace(sealed, chain={**sealed.chain, "previous": "other"})
    assert chain.find_broken(edited, "other") == ["its digest is not that of its content"]


def test_what_comes_later_has_a_digest_of_its_own_and_leaves_the_first(sealed):
    files = {**sealed.files, "test.jsonl": FileRecord("cd", 2)}
    metrics = {**sealed.metrics, "reward_test": 0.7}
    later = chain.extend(sealed, dataclasses.replace(sealed, files=files, metrics=metrics))
    assert later.chain["digest"] == sealed.chain["digest"]
    assert later.chain["added"] == {"files": ["test.jsonl"], "metrics": ["reward_test"]}
    assert chain.find_broken(later, "before") == []
    edited = dataclasses.replace(later, metrics={**metrics, "reward_test": 0.8})
    assert chain.find_broken(edited) == ["the digest of what was added to it is another one"]
    edited = dataclasses.replace(later, metrics={**metrics, "reward_eval": 0.8})
    assert chain.find_broken(edited) == ["its digest is not that of its content"]
    assert chain.find_head([sealed]) != chain.find_head([later])
    assert chain.extend(WHOLE, later) is later  # of an earlier version, which sealed nothing


def test_segments_of_later_rounds_change_nothing(sealed):
    later = dataclasses.replace(sealed, segments=({"round": 4},))
    assert chain.find_broken(later, "before") == []


def test_the_head_is_of_all_in_their_order(sealed):
    other = chain.seal(dataclasses.replace(WHOLE, round=2), sealed.chain["digest"], FACTS)
    heads = {chain.find_head(list(one)) for one in ([sealed], [sealed, other], [other, sealed])}
    assert len(heads) == 3 and "" not in heads
    assert chain.find_head([WHOLE]) == ""


def test_the_hash_of_a_config_is_of_results_alone():
    def compute(round=1, segments=(), **fields):
        return chain.hash_config(History(Config(**fields), segments=segments), round)

    same = [
        compute(),
        compute(workdir="elsewhere", progress=False, mode="verify"),
        compute(model=ModelConfig(path="moved", remat="full")),
    ]
    assert len(set(same)) == 1
    other = [
        compute(seed=1),
        compute(sampling=SamplingConfig(temperature=0.5)),
        compute(loss={"name": "kto"}),
        compute(optimizer=OptimizerConfig(learning_rate=1e-3)),
    ]
    assert len({*same, *other}) == 5
    # Runs begun before exact_ratios had "auto" are sealed without it, or with True.
    begun_before = compute(sampling=SamplingConfig(exact_ratios=False))
    assert begun_before == hashlib.sha256(b"{}").hexdigest() != same[0]
    changed = {"optimizer.learning_rate": [2e-6, 1e-3]}
    segments = ({"round": 2, "step": 9, "changed": changed},)
    later = {"optimizer": OptimizerConfig(learning_rate=1e-3), "segments": segments}
    assert compute(1, **later) == same[0]
    assert compute(2, **later) == other[3]


def test_rows_of_a_round_are_those_of_its_steps(tmp_path):
    rows = [
        {"step": 0, "round": 0, "reward_eval": 0.1},
        {"step": 0, "loss/eval": 0.9},
        {"step": 1, "loss/train": 0.8, "examples_per_second": 5.0},
        {"step": 2, "loss/train": 0.7},
        {"step": 2, "round": 1, "reward_eval": 0.2},
        {"step": 3, "loss/train": 0.6},
    ]

    def write(order, **more):
        text = "".join(json.dumps(rows[index] | more) + "\n" for index in order)
        (tmp_path / "metrics.jsonl").write_text(text)

    write(range(6))
    first, second = chain.hash_rows(tmp_path, 0, 2), chain.hash_rows(tmp_path, 2, 3)
    assert (first["count"], second["count"], chain.hash_rows(tmp_path, 0)["count"]) == (3, 1, 4)
    write([2, 1, 0, 3, 4, 5], examples_per_second=6.0)
    assert chain.hash_rows(tmp_path, 0, 2) == first
    rows[3]["loss/train"] = 0.71
    write(range(6))
    assert chain.hash_rows(tmp_path, 0, 2) != first
    assert chain.hash_rows(tmp_path, 2, 3) == second
    assert chain.hash_rows(tmp_path, 0, 0)["count"] == 0  # of round 0


def test_the_hash_of_inputs_is_of_their_content(tmp_path):
    entries = {"data.train": [{"name": "0:", "path": "/a", "size": 3, "whole": "ff"}]}
    (tmp_path / "inputs.json").write_text(json.dumps(entries))
    first = chain.hash_inputs(tmp_path)
    entries["data.train"][0]["path"] = "/b"
    (tmp_path / "inputs.json").write_text(json.dumps(entries))
    assert chain.hash_inputs(tmp_path) == first and list(first) == ["data.train"]
    entries["data.train"][0]["whole"] = "fe"
    (tmp_path / "inputs.json").write_text(json.dumps(entries))
    assert chain.hash_inputs(tmp_path) != first


def test_without_a_checkpoint_there_is_no_hash_of_one():
    assert chain.hash_sums(None) == "" != chain.hash_sums({"params/w": [[[[0, 2]], "ff"]]})


def test_the_steps_of_a_round_are_those_after_the_round_before(sealed):
    before = dataclasses.replace(WHOLE, metrics={"steps_done": 4})
    assert chain.find_steps(None, before) == (0, 4)
    assert chain.find_steps(before, dataclasses.replace(WHOLE, metrics={"steps_done": 9})) == (4, 9)
    assert chain.find_steps(before, WHOLE) == (4, 4)
    assert (chain.find_digest(sealed), chain.find_digest(None)) == (sealed.chain["digest"], "")


def test_changes_of_a_task_without_rounds_count_wherever_they_were_made():
    faster = OptimizerConfig(learning_rate=1e-3)
    segment = {"step": 9, "changed": {"optimizer.learning_rate": [2e-6, 1e-3]}}
    resumed = History(Config(task="sft", optimizer=faster), segments=(segment,))
    once = History(Config(task="sft", optimizer=faster))
    assert chain.hash_config(resumed, 0) == chain.hash_config(once, 0)
    assert chain.hash_config(resumed, 0) != chain.hash_config(History(Config(task="sft")), 0)


def test_a_default_of_the_loss_may_be_spelled_out():
    found = [
        chain.hash_config(History(Config(loss={"name": "dpo", **more})), 1)
        for more in ({}, {"beta": 0.1}, {"beta": 0.2})
    ]
    assert found[0] == found[1] != found[2]


def test_a_later_default_is_no_other_config():
    """Of a run that was sealed when temperature was 0.5 by default, and top_k no field yet."""
    now = defaults.list_defaults(Config())
    then = {path: value for path, value in now.items() if path != "sampling.top_k"}
    then["sampling.temperature"] = 0.5

    def compute(**fields):
        return chain.hash_config(History(Config(sampling=SamplingConfig(**fields))), 1, then)

    sealed = chain.hash_config(History(Config()), 1, now)  # nothing is other than by default
    assert compute(temperature=0.5) == compute(temperature=0.5, top_k=3) == sealed
    assert compute(temperature=0.7) != sealed != compute(temperature=0.5, top_p=0.5)


def test_a_seal_names_the_defaults_that_it_leaves_out():
    history = History(Config(seed=3))
    known = defaults.list_defaults(history.config)
    assert chain.describe_config(history, 1) == {
        "config": chain.hash_config(history, 1),
        "defaults": defaults.name_defaults(known),
    }
