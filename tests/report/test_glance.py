"""What one glance at a run tells."""

import dataclasses

import pytest

from halos_jax.report.glance import answer_all
from halos_jax.report.recorded import Recorded, read_run
from halos_jax.workdir.manifests import Manifest
from tests.report.written_runs import estimate, write_config, write_run


def make_run(tmp_path, *metrics, decisions=None, **fields) -> Recorded:
    """Return a run whose rounds have these metrics; `decisions` are those of the last one."""
    run = read_run(write_config(tmp_path, **fields))
    rounds = [Manifest(round, metrics=found) for round, found in enumerate(metrics)]
    rounds[-1] = dataclasses.replace(rounds[-1], decisions=decisions or {})
    return dataclasses.replace(run, rounds=tuple(rounds))


def ask(run, number, **more):
    one = answer_all(run, **more)[number]
    return one.level, one.answer, one.detail


LEARNING, DRIFT, LENGTH, ADVICE = range(4)


def reward(value, half=0.05):
    return estimate("reward_eval", value, half)


def test_a_run_that_learns(tmp_path):
    level, answer, detail = ask(read_run(write_run(tmp_path)), LEARNING)
    assert (level, answer) == ("good", "Yes")
    assert detail == (
        "Held-out reward 0.000 ±0.100 (SFT), 1.000 ±0.100 after round 2; wins 75% [65%, 85%] "
        "against SFT."
    )


@pytest.mark.parametrize(
    "rewards, level, answer",
    [
        ((0.2, 0.5), "good", "Yes"),
        ((0.2, 0.21), "watch", "Not beyond noise"),
        ((0.5, 0.2), "bad", "No: worse than SFT"),
        ((0.2, 0.9, 0.5), "watch", "It did, but falls"),
        ((0.2,), "unknown", "Not known yet"),
    ],
)
def test_learning_goes_by_intervals(tmp_path, rewards, level, answer):
    assert ask(make_run(tmp_path, *map(reward, rewards)), LEARNING)[:2] == (level, answer)


def test_the_win_rate_goes_first_where_there_is_one(tmp_path):
    wins = reward(0.9) | estimate("win_rate_eval", 0.51, 0.05)
    assert ask(make_run(tmp_path, reward(0.2), wins), LEARNING)[1] == "Not beyond noise"


def test_what_cannot_be_known_is_not_guessed(tmp_path):
    bare = make_run(tmp_path, {}, {"reward_train_mean": 0.25}, {"reward_train_mean": 0.5})
    answers = answer_all(bare)
    assert [one.level for one in answers[:3]] == ["unknown"] * 3
    assert answers[0].detail == (
        "There are no held-out prompts; mean reward of the training samples 0.250 to 0.500."
    )
    judged = {"kind": "judge", "judge": {"mode": "compare", "model": "m"}}
    run = make_run(tmp_path, reward(0.2), reward(0.9), reward=judged)
    assert ask(run, LEARNING)[:2] == ("unknown", "Not measured")


@pytest.mark.parametrize(
    "bound, level, answer",
    [
        (0.0, "good", "No sign of it"),
        (2.0, "good", "No sign of it"),
        (1.1, "watch", "Near the bound"),
        (0.9, "bad", "Beyond the bound"),
    ],
)
def test_drift_goes_by_the_bound_of_the_guard(tmp_path, bound, level, answer):
    run = make_run(tmp_path, {}, {"kl_sft": 1.0}, guard__max_kl=bound)
    assert ask(run, DRIFT)[:2] == (level, answer)


def test_a_margin_below_zero_beyond_its_interval_is_drift(tmp_path):
    signs = {"kl_sft": 1.0} | estimate("fresh_margin", -0.2, 0.05)
    level, _, detail = ask(make_run(tmp_path, {}, signs), DRIFT)
    assert level == "watch" and "preferred the worse answers" in detail


@pytest.mark.parametrize(
    "tokens, goes_with, level",
    [
        (105, 0.9, "good"),
        (120, 0.9, "good"),
        (140, 0.9, "bad"),
        (140, 0.0, "watch"),
        (140, None, "watch"),
        (60, 0.9, "watch"),
    ],
)
def test_length(tmp_path, tokens, goes_with, level):
    run = make_run(tmp_path, {"response_tokens_eval": 100}, {"response_tokens_eval": tokens})
    found = ask(run, LENGTH, length_reward=goes_with)
    assert found[0] == level and f"100 tokens at first, {tokens} after round 1" in found[2]


def test_advice_and_the_guard(tmp_path):
    calm = make_run(tmp_path, {}, {"tied_share": 0.1})
    assert ask(calm, ADVICE)[:2] == ("good", "Nothing to change")
    tied = make_run(tmp_path, {}, {"tied_share": 0.9})
    level, answer, detail = ask(tied, ADVICE)
    assert (level, answer) == ("watch", "A piece of advice") and "equal reward" in detail
    both = make_run(tmp_path, {}, {"tied_share": 0.9, "truncated": 9, "samples": 10})
    level, answer, detail = ask(both, ADVICE)
    assert answer == "2 pieces of advice" and detail.endswith(" 1 more below.")
    broken = {"bound": "guard.max_kl", "limit": 1.0, "rounds": [1], "values": [2.0]}
    stopped = {"guard": {"action": "stop", "broken": [broken]}}
    level, answer, detail = ask(make_run(tmp_path, {}, {}, decisions=stopped), ADVICE)
    assert (level, answer) == ("bad", "Stopped after round 1") and "guard.max_kl=1" in detail
    back = {"guard": {"action": "retry", "to": 0, "rate_factor": 0.5, "broken": [broken]}}
    assert ask(make_run(tmp_path, {}, {}, decisions=back), ADVICE)[1] == "Went back after round 1"


@pytest.mark.parametrize(
    "losses, answers",
    [
        ((0.7, 0.5, 0.4), ["good", "good"]),
        ((0.7, 0.4, 0.5), ["good", "watch"]),
        ((0.4, 0.7), ["bad"]),
        ((0.4,), ["unknown"]),
    ],
)
def test_a_task_that_trains_is_judged_by_its_held_out_loss(tmp_path, losses, answers):
    run = read_run(write_config(tmp_path, task="sft"))
    records = tuple({"step": step, "loss/eval": loss} for step, loss in enumerate(losses))
    found = answer_all(dataclasses.replace(run, metrics=records))
    assert [one.level for one in found] == answers


def test_without_held_out_data_the_training_loss_counts_and_accuracies_if_any(tmp_path):
    run = read_run(write_config(tmp_path, task="reward_model"))
    records = tuple({"step": step, "loss/train": 1 / (step + 1)} for step in range(20))
    records += ({"step": 20, "rewards_eval/accuracies": 0.8},)
    learning, accuracy = answer_all(dataclasses.replace(run, metrics=records))
    assert learning.detail == "Training loss 0.7500 at first, 0.0513 now."
    assert (accuracy.level, accuracy.answer) == ("watch", "80.0%")
