"""Decisions of a run, made again from its manifests."""

import dataclasses
from types import SimpleNamespace

import pytest

from halos_jax.audit.rederive import decisions
from halos_jax.config import Config, GuardConfig, RoundsConfig
from halos_jax.data.datasets import identify_prompts
from halos_jax.rounds.budget import Budget
from halos_jax.types import Prompt, Turn
from halos_jax.workdir.manifests import Manifest, round_folder, save_manifest

PROMPTS = [Prompt(str(number), (Turn("user", "a"),)) for number in range(12)]
CONFIG = Config(
    seed=3,
    rounds=RoundsConfig(total_prompts=12, prompts_per_round=5),
    guard=GuardConfig(max_kl=2.0, action="stop", patience=1),
)
STAGES = ("sample", "score", "feedback", "train", "evaluate")


def make_manifest(round, start, stop, **metrics):
    prompts = PROMPTS[start:stop] if round else PROMPTS[:1]
    return Manifest(
        round,
        seed=3,
        start=start,
        stop=stop,
        prompts=identify_prompts(prompts),
        policy=f"round-{round - 1:04d}" if round > 1 else "sft",
        reference="sft",
        stages=STAGES if round else ("evaluate",),
        metrics=metrics,
    )


@pytest.fixture
def replica(tmp_path):
    """Return the manifests of two rounds, of which the second has left the SFT policy behind."""
    best = {"round": 0, "reward": 0.5, "of": 1}
    made = [
        make_manifest(0, 0, 0, reward_eval=0.5),
        make_manifest(1, 0, 5, reward_eval=0.75, kl_sft=1.0),
        make_manifest(2, 5, 10, reward_eval=0.6, kl_sft=3.0),
    ]
    made[0] = dataclasses.replace(made[0], decisions={"best": best})
    best = {"round": 1, "reward": 0.75, "of": 2}
    passing = {"action": "none", "broken": [], "to": None, "rate_factor": 1.0, "retries": 0}
    made[1] = dataclasses.replace(made[1], decisions={"best": best, "guard": passing})
    run = make_run(tmp_path)
    found = SimpleNamespace(
        scratch=tmp_path,
        workdir=tmp_path,
        manifests={one.round: one for one in made},
        rounds=[0, 1, 2],
        at=lambda round: run,
    )
    for one in made:
        round_folder(tmp_path, one.round).mkdir(parents=True)
        save_manifest(round_folder(tmp_path, one.round), one)
    done = decisions.decide(run, made[2], decisions.StageResult({}, made[2].metrics))
    found.manifests[2] = dataclasses.replace(
        made[2], decisions=decisions._to_plain(dict(done.decisions))
    )
    return found


def make_run(workdir):
    return SimpleNamespace(
        config=CONFIG,
        workdir=workdir,
        prompts=PROMPTS,
        held_out=PROMPTS[:1],
        test=[],
        budget=Budget(12, 5),
    )


def test_a_round_as_it_was_planned_passes(replica):
    run = replica.at(1)
    for round in (1, 2):
        found = decisions.check_plan(replica, run, replica.manifests[round])
        assert [one.outcome for one in found] == ["passed", "passed"], found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stop": 9}, "prompts 5 to 9 are recorded, 5 to 10 follow"),
        ({"prompts": "0" * 64}, "the prompts of that range are others than those of the run"),
        ({"policy": "sft"}, "policy: 'sft' is recorded, 'round-0001' follows"),
        ({"reference": "previous_step"}, "reference: 'previous_step' is recorded, 'sft' follows"),
        ({"seed": 4}, "seed: 4 is recorded, 3 follows"),
    ],
)
def test_a_round_of_other_prompts_or_policies_is_found(replica, change, why):
    manifest = dataclasses.replace(replica.manifests[2], **change)
    found = decisions.check_plan(replica, replica.at(2), manifest)
    assert any(one.why.startswith(why) for one in found if one.outcome == "differs"), found


def test_the_guard_and_the_best_round_follow_from_the_metrics(replica):
    recorded = replica.manifests[2]
    assert recorded.decisions["best"] == {"round": 1, "reward": 0.75, "of": 3}
    assert recorded.decisions["guard"]["action"] == "stop"
    (found,) = decisions.check_ending(replica, recorded)
    assert (found.outcome, found.amount) == ("passed", "2 decisions")


@pytest.mark.parametrize(
    ("metric", "value", "why"),
    [
        ("reward_eval", 0.9, "best round: 1 is recorded, 2 is what it follows to be"),
        ("kl_sft", 1.5, "guard action: 'stop' is recorded, 'none' is what it follows to be"),
    ],
)
def test_a_decision_that_does_not_follow_is_found(replica, metric, value, why):
    recorded = replica.manifests[2]
    edited = dataclasses.replace(recorded, metrics={**recorded.metrics, metric: value})
    (found,) = decisions.check_ending(replica, edited)
    assert (found.outcome, found.why) == ("differs", why)


def test_a_round_under_way_has_not_decided_yet(replica):
    manifest = dataclasses.replace(replica.manifests[2], stages=STAGES[:3], decisions={})
    assert decisions.check_ending(replica, manifest) == []
