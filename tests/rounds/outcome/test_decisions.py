"""What is decided at the end of a round, where it is kept, and what follows from it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from halos_jax.config import (
    CheckpointConfig,
    Config,
    GuardConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
)
from halos_jax.config.rewards import PartConfig
from halos_jax.course.verdicts import Broken, Verdict
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.outcome import decisions
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import PROMPTS, make_run


def write_rewards(workdir, round, *rewards):
    """Write the samples of an evaluation: a prompt for each of `rewards`, of one sample each."""
    folder = round_folder(workdir, round)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt_id": f"p{i}", "reward": one} for i, one in enumerate(rewards)]
    rows += [{"prompt_id": "p0"}]  # a sample without a reward
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def decide(workdir, round, reward=None, config=Config(), held_out=PROMPTS[:2], kept=(), **metrics):
    """Decide at the end of a round and commit that; return the decisions."""
    saved = SimpleNamespace(find_round_end=lambda round: round if round in kept else None)
    run = make_run(workdir=workdir, config=config, held_out=held_out, checkpoints=saved)
    found = {} if reward is None else {"reward_eval": reward}
    manifest = Manifest(round=round, metrics=metrics, decisions={"auto": 1})
    done = decisions.decide(run, manifest, StageResult({}, found, {"own": 2}))
    assert done.metrics == found and done.decisions.get("own") == 2
    for stage in manifests.stages_of(round)[:-1]:
        manifest = dataclasses.replace(manifest, stages=(*manifest.stages, stage))
    folder = round_folder(workdir, round)
    folder.mkdir(parents=True, exist_ok=True)
    kept = manifests.commit_stage(
        folder, manifest, "evaluate", metrics=done.metrics, decisions=done.decisions
    )
    assert manifests.load_manifest(folder) == kept  # what JSON makes of it is the same
    return {name: one for name, one in kept.decisions.items() if name not in ("auto", "own")}


def test_each_round_says_the_best_and_how_the_reward_has_changed(tmp_path):
    write_rewards(tmp_path, 0, 0.0, 1.0, 1.0)
    assert decide(tmp_path, 0, 0.6) == {"best": {"round": 0, "reward": 0.6, "of": 1}}
    write_rewards(tmp_path, 1, 1.0, 1.0, 0.5)
    first = decide(tmp_path, 1, 0.8)
    assert first["best"] == {"round": 1, "reward": 0.8, "of": 2}
    assert first["guard"]["action"] == "none"
    change = first["guard"]["reward_change"]
    assert (change["than"], change["value"]) == (0, pytest.approx(1 / 6))
    assert change["low"] < 0 < change["high"]
    # A round without an evaluation, and one that has fallen below the best: all prompts by 1/2.
    assert decide(tmp_path, 2) == {
        "best": {"round": 1, "reward": 0.8, "of": 2},
        "guard": {"action": "none", "retries": 0},
    }
    write_rewards(tmp_path, 3, 0.5, 0.5, 0.0)
    third = decide(tmp_path, 3, 0.3)
    assert third["best"]["round"] == 1 and third["best"]["of"] == 3
    assert third["guard"]["action"] == "warn"
    assert third["guard"]["reward_change"] == {"than": 1, "value": -0.5, "low": -0.5, "high": -0.5}


def test_a_run_without_held_out_prompts_decides_nothing_but_what_it_is_asked(tmp_path):
    alone = {"held_out": []}
    assert decide(tmp_path, 0, **alone) == {}
    assert decide(tmp_path, 1, truncated=9, samples=9, **alone) == {}
    bound = Config(guard=GuardConfig(max_truncated=0.5, action="stop"))
    found = decide(tmp_path, 1, truncated=9, samples=9, config=bound, **alone)
    assert found["guard"]["action"] == "stop" and found.keys() == {"guard"}
    asked = Config(rounds=RoundsConfig(keep_best=False), guard=GuardConfig(fall=False))
    assert decide(tmp_path, 1, 0.5, config=asked) == {}


def test_a_run_of_an_older_version_keeps_no_best_round_unless_it_is_asked(tmp_path):
    for round in (0, 1):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True)
        manifests.save_manifest(folder, Manifest(round, metrics={"reward_eval": 0.5 - round}))
    write_rewards(tmp_path, 2, 0.0, 0.0)
    assert "best" not in decide(tmp_path, 2, 0.4)
    for changed in (
        Config(rounds=RoundsConfig(keep_best=True)),
        Config(guard=GuardConfig(action="retry")),
    ):
        found = decide(tmp_path, 2, 0.6, config=changed)
        assert found["best"] == {"round": 2, "reward": 0.6, "of": 2}


def save_verdicts(workdir, verdicts, **metrics):
    """Write manifests of complete rounds 1, 2, ... with these verdicts."""
    for round, verdict in enumerate(verdicts, 1):
        folder = round_folder(workdir, round)
        folder.mkdir(parents=True, exist_ok=True)
        stages = manifests.stages_of(round)
        chosen = {"guard": verdict.to_record(), "best": {"round": 1, "reward": 0.5, "of": 1}}
        manifest = Manifest(round, stages=stages, metrics=metrics, decisions=chosen)
        manifests.save_manifest(folder, manifest)


BROKEN = (Broken("guard.max_kl", (2,), (12.0,), 10.0),)
BACK = Verdict("retry", BROKEN, 1, 0.5)
NONE = Verdict("none")


def test_the_start_of_a_round_is_where_the_one_before_has_sent_it(tmp_path):
    save_verdicts(tmp_path, [NONE, BACK, Verdict("warn", BROKEN), dataclasses.replace(BACK, to=0)])
    assert [decisions.find_start(tmp_path, round) for round in range(7)] == [0, 0, 1, 1, 3, 0, 5]
    assert decisions.find_verdict(tmp_path, 2) == BACK
    config = Config(optimizer=OptimizerConfig(learning_rate=8e-6))
    rates = [
        decisions.lower_rate(config, tmp_path, round).optimizer.learning_rate
        for round in range(1, 7)
    ]
    assert rates == [8e-6, 8e-6, 4e-6, 4e-6, 2e-6, 2e-6]
    assert decisions.lower_rate(config, tmp_path, 2) is config


def test_the_checkpoints_that_a_resume_may_need_are_kept(tmp_path):
    save_verdicts(tmp_path, [NONE, NONE, NONE, dataclasses.replace(BACK, to=2)])
    one, three = (Config(checkpoint=CheckpointConfig(keep=keep)) for keep in (1, 3))
    assert decisions.find_needed(one, tmp_path, 3) == {1, 3}
    assert decisions.find_needed(one, tmp_path, 4) == {1, 2}  # where round 5 starts
    assert decisions.find_needed(three, tmp_path, 4) == {1, 2, 3}
    # Round 5 is under way: what is best is known from round 4.
    manifests.save_manifest(round_folder(tmp_path, 4), Manifest(4))
    assert decisions.find_needed(one, tmp_path, 4) == {1, 4}
    assert decisions.find_needed(one, tmp_path / "new", 0) == set()


def test_a_run_that_may_go_back_keeps_what_it_may_go_back_to(tmp_path):
    """It goes back to the best round within the bounds whose checkpoint is there."""
    guard = GuardConfig(max_kl=1, action="retry", fall=False)
    config = Config(guard=guard)
    kls = {1: 0.0, 2: 0.4, 3: 0.8, 4: 1.1}
    needed = []
    for round in range(5):
        write_rewards(tmp_path, round, float(round), float(round))
        found = decide(tmp_path, round, 0.1 * round, config, kl_sft=kls.get(round), kept=(1, 2, 3))
        if round:
            # The next round may tell that the last one is beyond: then the one before is wanted.
            needed.append(decisions.find_needed(config, tmp_path, round))
    assert found["best"]["round"] == 4
    assert (found["guard"]["action"], found["guard"]["to"]) == ("retry", 2)
    assert needed == [{1}, {1, 2}, {2, 3}, {2, 3, 4}]
    found = decide(tmp_path, 4, 0.4, config, kl_sft=1.1, kept=(1, 3))
    assert found["guard"]["to"] == 1  # round 2's checkpoint is gone


def test_a_stop_holds_as_long_as_the_bounds_say_so(tmp_path):
    strict = Config(guard=GuardConfig(max_kl=10, action="stop", fall=False))
    save_verdicts(tmp_path, [NONE, Verdict("stop", BROKEN)], kl_sft=12.0)
    (tmp_path / "rounds" / "0000").mkdir()
    manifests.save_manifest(round_folder(tmp_path, 0), Manifest(0))
    assert decisions.find_stop(strict, tmp_path, 3).broken == BROKEN
    assert decisions.find_stop(strict, tmp_path, 2) is None
    for change in ({"max_kl": 13.0}, {"action": "warn"}, {"patience": 3}):
        guard = dataclasses.replace(strict.guard, **change)
        assert decisions.find_stop(Config(guard=guard), tmp_path, 3) is None
    # What had begun before the bound was set back goes on.
    round_folder(tmp_path, 3).mkdir()
    manifests.save_manifest(round_folder(tmp_path, 3), Manifest(3))
    assert decisions.find_stop(strict, tmp_path, 3) is None


def test_what_is_broken_is_said_and_nothing_else(caplog):
    decisions.report_verdict(Manifest(3, decisions={"guard": NONE.to_record()}))
    assert not caplog.records
    decisions.report_verdict(Manifest(3, decisions={"guard": BACK.to_record()}))
    assert "round 3 is beyond guard.max_kl=10" in caplog.text
    assert "the next round starts from round 1" in caplog.text
    caplog.clear()
    decisions.report_verdict(Manifest(3, decisions={"guard": BACK.to_record()}), is_last=True)
    assert "a further one, with more prompts, starts from round 1" in caplog.text


def test_rewards_of_a_file_are_read_once_until_it_changes(tmp_path, monkeypatch):
    write_rewards(tmp_path, 0, 0.0, 1.0)
    path, reads = round_folder(tmp_path, 0) / "eval.jsonl", []
    read = decisions.read_records
    monkeypatch.setattr(
        decisions, "read_records", lambda path, **named: reads.append(path) or read(path, **named)
    )
    for _ in range(2):
        assert decisions.read_rewards(path) == {"p0": [0.0], "p1": [1.0]}
    assert reads == [path]
    write_rewards(tmp_path, 0, 0.0, 1.0, 2.0)
    assert decisions.read_rewards(path) == {"p0": [0.0], "p1": [1.0], "p2": [2.0]}
    path.unlink()
    assert decisions.read_rewards(path) == {} and reads == [path] * 2


def test_nothing_is_decided_by_a_reward_that_compares_one_policy_s_samples(tmp_path):
    reward = RewardConfig(parts={"a": PartConfig(kind="function", normalise="prompt")})
    config = Config(reward=reward)
    assert not decisions.keeps_best(config, is_evaluated=True)
    assert decisions.keeps_best(Config(), is_evaluated=True)
    for round in range(2):
        write_rewards(tmp_path, round, 1.0 - round, 1.0 - round)
        assert decide(tmp_path, round, 0.0, config) == {}
    # Bounds on other signs hold.
    config = dataclasses.replace(config, guard=GuardConfig(max_kl=1.0))
    write_rewards(tmp_path, 2, -1.0, -1.0)
    (broken,) = decide(tmp_path, 2, 0.0, config, kl_sft=2.0)["guard"]["broken"]
    assert broken["bound"] == "guard.max_kl"
