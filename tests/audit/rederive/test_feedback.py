"""Feedback made again from samples and scores."""

import dataclasses
from types import SimpleNamespace

import pytest

from halos_jax.audit.rederive import feedback
from halos_jax.config import Config, FeedbackConfig, SamplingConfig
from halos_jax.losses import get_loss
from halos_jax.rounds import stages
from halos_jax.rounds.budget import Budget
from halos_jax.workdir.manifests import FileRecord
from tests.audit.rederive.test_rewards import Replica, make_rollouts, make_round

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
