"""Feedback made again from samples and scores."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from halos_jax.audit.rederive import feedback
from halos_jax.config import Config, FeedbackConfig, SamplingConfig
from halos_jax.losses import get_loss
from halos_jax.rounds import stages
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.replay import choose
from halos_jax.workdir.manifests import FileRecord
from tests.audit.rederive.test_rewards import Replica, make_rollouts, make_round
from tests.rounds.replay.test_choose import write_round

CONFIG = Config(
    seed=3,
    feedback=FeedbackConfig(mode="all", margin_weights=2.0, max_length_gap=1.0),
    sampling=SamplingConfig(num_samples_per_prompt=1, shard_prompts=1),
)


@pytest.fixture
def made(tmp_path):
    """Return a round whose feedback is as it was made, its replica and what made it."""
    manifest = make_round(tmp_path, [0.0, 1.0, 3.0])
    rollouts = make_rollouts(tmp_path, None, CONFIG)
    done = stages.feedback_stage(rollouts, tmp_path / "0001", 1)
    manifest = dataclasses.replace(
        manifest,
        files={name: FileRecord("", count) for name, count in done.files.items()},
        metrics=done.metrics,
    )
    run = SimpleNamespace(rollouts=rollouts, config=CONFIG)
    return Replica(tmp_path), run, manifest


def test_the_same_bytes_come_out(made):
    found = feedback.check_feedback(*made)
    assert [one.outcome for one in found] == ["passed", "passed"]
    assert found[0].amount == "3 records"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace('"reward_B": 1.0', '"reward_B": 2.0'), "line 3: reward_B: 2.0"),
        (lambda text: text.split("\n", 1)[1], "2 records, but 3 follow"),
        (lambda text: text.replace('"weight": ', '"weight":  ', 1), "the same records, written"),
    ],
)
def test_edited_pairs_are_found(made, change, why):
    replica, run, manifest = made
    path = replica.folder(1) / "feedback.jsonl"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    found = feedback.check_feedback(replica, run, manifest)
    assert found[0].outcome == "differs"
    assert found[0].why.startswith(why)


def refill(made, *extents, ended="enough"):
    replica, run, manifest = made
    config = dataclasses.replace(CONFIG, feedback=FeedbackConfig(min_examples=1, type="scalar"))
    run = SimpleNamespace(
        config=config,
        trainer=SimpleNamespace(loss=get_loss({"name": "dr_grpo"})),
        budget=Budget(9, 1),
        prompts=range(9),
    )
    known = [{"stop": stop, "examples": count, "counts": {}} for stop, count in extents]
    decisions = {"refill": {"extents": known, "ended": ended}}
    manifest = dataclasses.replace(manifest, stop=extents[-1][0], decisions=decisions)
    return feedback.check_refill(run, manifest, replica)


def test_each_decision_on_further_prompts_is_made_again(made):
    """One answer of a group teaches nothing, two different ones are an example."""
    (found,) = refill(made, (1, 0), (2, 1))
    assert (found.outcome, found.amount) == ("passed", "2 extents")
    (found,) = refill(made, (1, 0), (2, 0))
    assert found.outcome == "differs"
    assert found.why == (
        "extent 1: 1 examples, then up to prompt 2 (enough) follow; recorded: 0, 2 (enough)"
    )


def test_a_round_without_extents_has_no_such_decision(made):
    replica, run, manifest = made
    assert feedback.check_refill(run, manifest, replica) == []


PAIR = {"label": 1, "ids_A": [3], "logps_A": [-0.5], "logps_B": [-0.25]}
OLD = {"label": 1, "ids_A": [3]}


@pytest.mark.parametrize(
    ("recorded", "made", "outcome", "why"),
    [
        (OLD, PAIR, "passed", "an earlier version wrote it, without logps_A and logps_B"),
        (OLD | {"label": 0}, PAIR, "differs", "line 1: label: 0 is recorded, 1 is"),
        (PAIR | {"logps_B": [-0.75]}, PAIR, "differs", "line 1: logps_B[0]: -0.75 is recorded"),
        (OLD | {"logps_A": [-0.5]}, PAIR, "differs", "line 1: logps_B: None is recorded"),
        (PAIR, PAIR, "differs", "the same records, written otherwise"),
    ],
)
def test_fields_that_an_earlier_version_did_not_write_are_left_out(recorded, made, outcome, why):
    found = feedback.compare_records([recorded], [made], "again")
    assert (found.outcome, found.amount) == (outcome, "1 records")
    assert found.why.startswith(why)


@pytest.fixture
def replayed(tmp_path):
    """Return what `made` does, of a round 2 that replays one of the records of round 1."""
    config = dataclasses.replace(CONFIG, feedback=dataclasses.replace(CONFIG.feedback, replay=0.25))
    write_round(tmp_path, 1, [{"prompt_id": f"q{number}"} for number in range(9)])
    manifest = make_round(tmp_path, [0.0, 1.0, 3.0])
    (tmp_path / "0001").rename(tmp_path / "0002")
    rollouts = make_rollouts(tmp_path, None, config)
    done = stages.feedback_stage(rollouts, tmp_path / "0002", 2)
    files = {name: FileRecord("", count) for name, count in done.files.items()}
    manifest = dataclasses.replace(
        manifest, round=2, files=files, metrics=done.metrics, decisions=done.decisions
    )
    return Replica(tmp_path), SimpleNamespace(rollouts=rollouts, config=config), manifest


def test_what_a_round_replays_is_chosen_again(replayed):
    (record,) = choose.read_replayed(replayed[0].folder(2))
    assert record["replayed_round"] == 1
    found = feedback.check_feedback(*replayed)
    assert [one.outcome for one in found] == ["passed", "passed", "passed"]
    assert found[2].amount == "1 records"


@pytest.mark.parametrize("change", ["record", "decision", "file"])
def test_another_choice_is_found(replayed, change):
    replica, run, manifest = replayed
    path = replica.folder(2) / choose.FILE
    if change == "record":
        (record,) = choose.read_replayed(replica.folder(2))
        names = {"q1", "q2"} - {record["prompt_id"]}
        path.write_text(json.dumps({**record, "prompt_id": min(names)}) + "\n")
    elif change == "file":
        path.unlink()
    else:
        chosen = {"replay": {"examples": 1, "rounds": {"2": 1}}}
        manifest = dataclasses.replace(manifest, decisions=chosen)
    assert feedback.check_feedback(replica, run, manifest)[2].outcome == "differs"
