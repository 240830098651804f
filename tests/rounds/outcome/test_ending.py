"""Which policy a run exports, and what it says of it."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import Config, DataConfig, GuardConfig, RoundsConfig
from halos_jax.course.verdicts import Broken, Verdict
from halos_jax.rounds.order import load_order, save_order
from halos_jax.rounds.outcome import ending
from halos_jax.rounds.progress import Progress
from halos_jax.types import TrainState
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.outcome.test_decisions import write_rewards
from tests.rounds.stand_ins import PROMPTS, make_run

REWARDS = {0: (0.0, 0.25, 0.5), 1: (1.0, 1.0, 0.5), 2: (0.5, 0.5, 0.25)}


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Return a function that takes the final policy of a run of two rounds with this best one."""
    monkeypatch.setattr(ending, "load_start", lambda *_: {"w": jnp.array([0.0])})

    def call(best, *, config=Config(), saved=(1,), held_out=PROMPTS, ema=None, guard=None, of=3):
        for round, rewards in REWARDS.items():
            write_rewards(tmp_path, round, *rewards)
            kept = {} if best is None else {"best": {"round": best, "reward": 0.5, "of": of}}
            kept |= {"guard": guard.to_record()} if guard and round == 2 else {}
            manifest = Manifest(round, metrics={"kl_sft": 12.0}, decisions=kept)
            manifests.save_manifest(round_folder(tmp_path, round), manifest)
        policy = SimpleNamespace(params={"w": "w", "value": "v"})
        run = make_run(
            workdir=tmp_path,
            config=config,
            held_out=held_out,
            trainer=SimpleNamespace(abstract_state=policy, frozen=None),
            checkpoints=SimpleNamespace(
                find_round_end=lambda round: 10 + round if round in saved else None,
                restore_policy=lambda abstract, save_id: {
                    "w": jnp.array([float(save_id)]),
                    "asked": abstract,
                },
            ),
        )
        state = TrainState(jnp.int32(4), {"w": jnp.array([2.0])}, (), ema=ema)
        final = ending.take_final(run, Progress(state, 2))
        return final.params, final.round, final.name

    return call


def test_the_best_round_is_taken_from_its_checkpoint(take, caplog):
    caplog.set_level("INFO")
    params, round, name = take(1)
    assert params["w"].tolist() == [11.0] and params["asked"] == {"w": "w"}
    assert (round, name) == (1, "the policy of round 1, the best,")
    assert "best round: 1, the best of 3 (reward_eval 0.5000, +0.4167 [" in caplog.text
    assert "] against round 2, the last, +0.5833 [" in caplog.text
    assert "against round 0, SFT); the best of several noisy rounds is flattered" in caplog.text
    with pytest.raises(CheckpointError, match=r"best round, 1, is gone.*keep_best=false"):
        take(1, saved=())


def test_the_last_round_may_be_the_best_and_is_exported_as_it_is_averaged(take):
    params, round, name = take(2, saved=(), ema={"w": jnp.array([3.5])})
    assert params["w"].tolist() == [3.5] and (round, name) == (2, "the last policy")


def test_a_run_that_only_got_worse_exports_the_sft_policy_and_says_so(take, caplog):
    params, round, name = take(0)
    assert params["w"].tolist() == [0.0] and (round, name) == (0, "the SFT policy")
    assert "no round was better than the SFT policy" in caplog.text
    caplog.clear()
    assert take(0, of=1)[1] == 0
    assert "no round after round 0 was evaluated: final/ holds the SFT policy" in caplog.text
    assert "no round was better" not in caplog.text


@pytest.mark.parametrize(
    ("best", "config", "held_out", "is_said"),
    [
        (1, Config(rounds=RoundsConfig(keep_best=False)), PROMPTS, False),
        (None, Config(), [], False),
        (None, Config(), PROMPTS, True),  # begun by an older version
    ],
)
def test_without_a_best_round_the_last_policy_is_exported(
    take, caplog, best, config, held_out, is_said
):
    params, round, name = take(best, config=config, held_out=held_out)
    assert params["w"].tolist() == [2.0] and (round, name) == (2, "the last policy")
    assert ("begun without rounds.keep_best" in caplog.text) == is_said


@pytest.mark.parametrize(
    ("best", "settings", "round"),
    [(1, {"max_kl": 10}, 1), (2, {"max_kl": 10}, 2), (0, {"max_kl": 10}, None), (1, {}, None)],
)
def test_a_final_policy_beyond_a_bound_is_said(take, caplog, best, settings, round):
    assert take(best, config=Config(guard=GuardConfig(**settings)))[1] == best
    said = f"final/ holds the policy of round {round}, which is beyond guard.max_kl=10 ("
    assert (said in caplog.text) == (round is not None)
    assert ("which is beyond" in caplog.text) == (round is not None)


def test_a_run_that_the_guard_has_ended_says_why(take, caplog):
    stop = Verdict("stop", (Broken("guard.max_kl", (2,), (12.0,), 10.0),))
    take(2, config=Config(guard=GuardConfig(max_kl=10, action="stop", fall=False)), guard=stop)
    assert "the guard has ended the run after round 2: guard.max_kl=10" in caplog.text
    caplog.clear()
    take(2, guard=stop)
    assert "ended the run" not in caplog.text


def test_a_run_that_the_guard_has_ended_has_more_to_do_once_the_bound_is_raised(tmp_path, caplog):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(20)))
    guard = GuardConfig(max_kl=10, action="stop", fall=False)
    rounds = RoundsConfig(total_prompts=20, prompts_per_round=8)
    config = Config(data=DataConfig(train=str(file)), guard=guard, rounds=rounds)
    raised = dataclasses.replace(config, guard=dataclasses.replace(guard, max_kl=20))
    save_order(load_order(config, tmp_path), tmp_path)

    def end(round, stop, verdict):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {"guard": verdict.to_record()}
        manifest = Manifest(round, stop=stop, metrics={"kl_sft": 12.0}, decisions=chosen)
        manifests.save_manifest(folder, manifest)

    broken = (Broken("guard.max_kl", (1,), (12.0,), 10.0),)
    end(0, 0, Verdict("none"))
    end(1, 8, Verdict("stop", broken))
    assert not ending.has_more(config, tmp_path) and ending.has_more(raised, tmp_path)
    end(1, 8, Verdict("warn", broken))
    assert not ending.has_more(raised, tmp_path)
    end(1, 8, Verdict("stop", broken))
    ending.report_stop(config, tmp_path, 1)
    assert "ended the run after round 1" in caplog.text and "used up" not in caplog.text
    # In the second pass over the 20 prompts.
    more = dataclasses.replace(rounds, passes=2, total_prompts=40)
    end(1, 24, Verdict("stop", broken))
    assert ending.has_more(dataclasses.replace(raised, rounds=more), tmp_path)
    end(1, 40, Verdict("stop", broken))
    assert not ending.has_more(dataclasses.replace(raised, rounds=more), tmp_path)
    end(1, 20, Verdict("stop", broken))  # its budget is used up
    assert not ending.has_more(raised, tmp_path)
    ending.report_stop(config, tmp_path, 1)
    assert "raise rounds.total_prompts (it is used up)" in caplog.text
