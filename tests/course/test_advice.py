"""Advice, tried on the runs that its thresholds are from.

Qwen2.5-Coder-0.5B-Instruct on GSM8K: right answers of 4 samples to 400 held-out questions in per
cent, whose standard error is about 1.3 points; KL in nats a response. Between measured rounds the
values are interpolated.
"""

import dataclasses

import numpy as np
import pytest

from halos_jax.config import Config, FeedbackConfig, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.course import advice
from halos_jax.course.advice import THRESHOLDS, RoundSigns, list_hints, list_new_hints
from halos_jax.course.budget_text import FEW_STEPS, RoundSize, find_traps

HALF = 1.96 * 0.013
CONFIG = Config(
    sampling=SamplingConfig(
        num_samples_per_prompt=4, max_tokens=320, max_prompt_length=256, shard_prompts=128
    ),
    train=TrainConfig(batch_size=32, max_length=576),
    rounds=RoundsConfig(prompts_per_round=128),
)


def make_run(rewards, kls=None, *, rate=2e-6, steps=2, **metrics):
    """Return the signs of rounds whose rewards and KLs are given at some rounds.

    Args:
      rewards: round -> right answers in per cent; the KL of a round is that of the policy before
        it was trained.
    """
    rounds = range(max(rewards) + 1)
    values = np.interp(rounds, list(rewards), list(rewards.values())) / 100
    nats = np.interp(rounds, list(kls), list(kls.values())) if kls else None
    made = []
    for round in rounds:
        reward = float(values[round])
        found = {"reward_eval": reward, "steps_done": steps * round}
        found |= {"reward_eval/low": reward - HALF, "reward_eval/high": reward + HALF}
        if round:
            found |= {"feedback_pairs": 32 * steps, **metrics}
            found |= {} if nats is None else {"kl_sampled": float(nats[round])}
        made.append(RoundSigns(round, 128 * bool(round), rate, found))
    return made


def tell(run, config=CONFIG):
    """Return (round, hint) of all that is said in the course of a run."""
    new = list_new_hints(config, run)
    return [(round, hint) for round, hints in enumerate(new) for hint in hints]


TOO_HIGH = {
    "offline": (make_run({0: 16.7, 1: 6.8}, rate=5e-6, steps=32), 1, "fell from 0.167 after"),
    "4 x 512": (
        make_run({0: 16.3, 1: 19.3, 2: 14.2, 3: 16.3}, rate=5e-6, steps=8),
        2,
        "fell from 0.193 after round 1 to 0.142",
    ),
    "16 x 128": (
        make_run({0: 16.3, 9: 24.7, 16: 21.9}, {1: 0.0, 10: 8.5, 16: 18.0}, rate=5e-6),
        13,
        "grew from 8.5 to 13.2 nats a response since round 9",
    ),
    "batches of 16, 8 samples": (
        make_run({0: 17.3, 6: 27.2, 7: 20.4}, rate=2e-6, steps=16),
        7,
        "fell from 0.272 after round 6 to 0.204",
    ),
    "batches of 16, 3e-6": (
        make_run({0: 16.9, 7: 26.3, 10: 11.7}, rate=3e-6, steps=16),
        9,
        "fell from 0.263 after round 7 to 0.166",
    ),
}


@pytest.mark.parametrize("name", TOO_HIGH)
def test_runs_that_lost_what_they_had_learnt_are_told_that_the_rate_is_too_high(name):
    run, round, cause = TOO_HIGH[name]
    ((found, hint),) = tell(run)
    assert found == round and hint.about == "rate"
    assert hint.text.startswith("the learning rate is too high: ") and cause in hint.text
    assert hint.suits == f"optimizer.learning_rate={run[0].rate / 2:.3g}"
    assert f"--config.{hint.suits}" in hint.text


@pytest.mark.parametrize(
    "run",
    [
        make_run({0: 16.3, 1: 20.1}, {1: 0.0}, rate=1e-6, steps=32),
        make_run({0: 17.5, 16: 21.1}, {1: 0.0, 17: 0.8}, rate=1e-6),
        make_run({0: 17.7, 39: 23.3}, {1: 0.0, 40: 2.2}, rate=1e-6),
        make_run({0: 15.4, 4: 22.4}, {1: 0.0, 5: 2.5}, steps=8),
        make_run({0: 17.4, 16: 23.1}, {1: 0.0, 17: 4.5}),
        make_run({0: 16.9, 15: 24.9, 16: 23.3}, {1: 0.0, 17: 4.5}),
        make_run({0: 17.7, 16: 24.2}, {1: 0.0, 17: 8.0}, rate=3e-6),
        # The presets: configs/online_dpo.py (two seeds) and configs/gsm8k.py.
        make_run({0: 17.2, 2: 21.6, 4: 23.8, 6: 26.5, 8: 27.8, 10: 29.3, 14: 30.4}, steps=7),
        make_run({0: 18.6, 2: 21.6, 4: 24.6, 8: 28.4, 10: 27.6, 12: 25.9, 14: 28.6}, steps=7),
        make_run({0: 14.2, 4: 23.0, 8: 28.6, 12: 31.9, 20: 36.1, 28: 39.5}, steps=8),
    ],
)
def test_runs_that_learnt_are_told_nothing(run):
    assert tell(run) == []


def with_margin(value, half, **metrics):
    margin = {"fresh_margin": value, "fresh_margin/low": value - half}
    return make_run({0: 20, 2: 20}, **margin, **{"fresh_margin/high": value + half}, **metrics)


def test_a_negative_margin_on_new_pairs_counts_beyond_its_interval():
    ((round, hint),) = tell(with_margin(-0.2, 0.14))
    assert round == 1 and "(margin -0.200, at most -0.060)" in hint.text
    assert hint.suits == "optimizer.learning_rate=1e-06"
    assert tell(with_margin(-0.1, 0.14)) == [], "50 pairs say little"
    assert tell(with_margin(-0.03, 0.01)) == [], "a run that rose on had this"
    assert tell(make_run({0: 20, 2: 20}, fresh_margin=-0.2)) == [], "its interval is not known"


@pytest.mark.parametrize("signs", [{"fresh_margin": -0.15}, {"kl_stale": 0.5, "stale_ess": 0.1}])
def test_signs_of_too_much_count_only_where_the_reward_does_not_rise(signs):
    """DAPO, groups of 8, 2e-6, rounds of 256: it rose to the end in three of three seeds."""
    signs |= {f"fresh_margin/{end}": -0.15 + by for end, by in (("low", -0.12), ("high", 0.12))}
    rising = make_run({0: 15.2, 4: 24.8, 8: 31.4, 11: 34.6}, steps=8, **signs)
    assert tell(rising) == []
    ((round, _),) = tell(make_run({0: 15.2, 4: 24.8, 5: 24.8}, steps=8, **signs))
    assert round == 5


def test_a_policy_that_hardly_moves_is_told_once_it_has_had_its_chance():
    """24 steps are done after round 12, whose policy samples in round 13."""
    run = make_run({0: 17.5, 20: 17.9}, {1: 0.0, 20: 0.1}, rate=1e-7, fresh_margin=0.004)
    ((round, hint),) = tell(run)
    assert (round, hint.suits) == (13, "optimizer.learning_rate=2e-07")
    assert "may be too low: after 24 steps the policy is 0.06 nats" in hint.text
    rising = make_run({0: 17.5, 12: 25.0, 20: 26.0}, {1: 0.0, 20: 0.1}, rate=1e-7)
    assert tell(rising) == []
    unmeasured = make_run({0: 17.5, 20: 17.9}, rate=1e-7)
    assert tell(unmeasured) == []


def test_a_kl_that_grows_needs_an_evaluation_that_says_that_nothing_is_gained():
    run = make_run({0: 16.3, 9: 24.7, 16: 21.9}, {1: 0.0, 10: 8.5, 16: 18.0})
    blind = [
        one._replace(
            metrics={
                name: value
                for name, value in one.metrics.items()
                if one.round <= 9 or not name.startswith("reward")
            }
        )
        for one in run
    ]
    assert tell(blind) == []


def test_stale_samples_ask_for_shorter_rounds():
    run = make_run({0: 20, 1: 20}, steps=8, kl_stale=0.4, stale_ess=0.45)
    long = [one._replace(prompts=512 * bool(one.round)) for one in run]
    ((_, hint),) = tell(long)
    assert hint.about == "staleness" and hint.suits == "rounds.prompts_per_round=256"
    assert "(KL 0.40 nats a response, effective share of its samples 0.45)" in hint.text
    short = [one._replace(prompts=100 * bool(one.round)) for one in run]
    assert tell(short)[0][1].suits == "rounds.prompts_per_round=50", "not even one shard"
    odd = [one._replace(prompts=700 * bool(one.round)) for one in run]
    assert tell(odd)[0][1].suits == "rounds.prompts_per_round=256", "whole shards"
    assert tell(make_run({0: 20, 1: 20}, kl_stale=0.35, stale_ess=0.5)) == []
    assert len(tell(make_run({0: 20, 1: 20}, stale_ess=0.49))) == 1
    assert len(tell(make_run({0: 20, 1: 20}, kl_stale=0.36))) == 1


def test_ties_ask_for_more_samples_where_samples_are_compared():
    run = make_run({0: 20, 1: 20}, tied_share=0.6)
    ((_, hint),) = tell(run)
    assert hint.suits == "sampling.num_samples_per_prompt=8" and hint.text.startswith("60% of the")
    assert tell(make_run({0: 20, 1: 20}, tied_share=0.5)) == []
    by_file = dataclasses.replace(
        CONFIG, feedback=FeedbackConfig(type="binary"), loss={"name": "kto"}
    )
    assert tell(run, by_file) == [], "a prompt of ties gives answers that are learnt from"
    by_prompt = dataclasses.replace(by_file, feedback=FeedbackConfig("binary", scope="prompt"))
    assert len(tell(run, by_prompt)) == 1
    ppo = dataclasses.replace(CONFIG, feedback=FeedbackConfig("scalar"), loss={"name": "ppo"})
    assert tell(run, ppo) == []


def test_cut_samples_ask_for_a_higher_limit_that_fits():
    run = make_run({0: 20, 1: 20}, samples=512, truncated=170)
    ((_, hint),) = tell(run)
    assert hint.suits == "sampling.max_tokens=512 --config.train.max_length=768"  # 480 -> 512
    assert "33% of the samples were cut at sampling.max_tokens=320" in hint.text
    roomy = dataclasses.replace(CONFIG, train=TrainConfig(max_length=1250))
    assert tell(run, roomy)[0][1].suits == "sampling.max_tokens=512"
    assert tell(make_run({0: 20, 1: 20}, samples=512, truncated=102)) == []


def test_a_round_of_a_single_step_asks_for_more_prompts():
    """20 pairs of 128 prompts: 64 pairs, two steps, take 409.6 prompts, which are 4 shards."""
    run = make_run({0: 20, 1: 20}, steps=1)
    few = [one._replace(metrics={**one.metrics, "feedback_pairs": 20}) for one in run]
    ((_, hint),) = tell(few)
    assert hint.suits == "rounds.prompts_per_round=512"
    assert "the round's 20 pairs were a single step of train.batch_size=32" in hint.text
    assert hint.text.endswith("or --config.train.batch_size=10 in the next run")
    assert tell(make_run({0: 20, 1: 20}, steps=2)) == []
    assert tell(make_run({0: 20, 1: 20}, steps=0)) == [], "a round of ties alone is said elsewhere"
    auto = dataclasses.replace(CONFIG, rounds=RoundsConfig(prompts_per_round="auto"))
    assert tell(few, auto) == []


def test_advice_keeps_to_what_the_config_allows():
    rounds = RoundsConfig(total_prompts=64, prompts_per_round=8)
    config = dataclasses.replace(CONFIG, rounds=rounds)
    run = make_run({0: 20, 1: 20}, steps=1)
    one = [each._replace(metrics={**each.metrics, "feedback_pairs": 1}) for each in run]
    ((_, hint),) = tell(one, config)
    assert hint.suits == "rounds.total_prompts" and "prompts_per_round" not in hint.text
    assert "the round's 1 pair was a single step" in hint.text and "batch_size=1 " not in hint.text
    refilled = dataclasses.replace(
        config, feedback=FeedbackConfig(min_examples=4), sampling=SamplingConfig(shard_prompts=2)
    )
    ((_, hint),) = tell(make_run({0: 20, 1: 20}, tied_share=0.6), refilled)
    assert hint.text.endswith("=8, or a higher sampling.temperature, in the next run")
    # A round of 8 prompts that got 120 further ones: half of the 8.
    ((_, hint),) = tell(make_run({0: 20, 1: 20}, steps=8, kl_stale=0.4), refilled)
    assert hint.suits == "rounds.prompts_per_round=4"


def test_the_shortest_rounds_that_are_stale_ask_for_a_lower_rate():
    rounds = RoundsConfig(prompts_per_round="auto", min_prompts_per_round=128)
    config = dataclasses.replace(CONFIG, rounds=rounds)
    run = make_run({0: 20, 1: 20}, kl_stale=0.4)
    ((_, hint),) = tell(run, config)
    assert (hint.about, hint.suits) == ("staleness", "optimizer.learning_rate=1e-06")
    assert hint.text.startswith("rounds are as short as they may be (128 prompts), but at the end")
    assert tell([one._replace(prompts=256 * one.round) for one in run], config) == []
    assert tell([run[0], run[1]._replace(back_to=0)], config) == []


def test_no_higher_rate_is_advised_after_a_retry():
    """The guard went back from round 3 to round 1: 26 steps later the policy has hardly moved."""
    run = make_run({0: 17.5, 20: 17.9}, {1: 0.0, 20: 0.1}, rate=1e-7, fresh_margin=0.004)
    assert len(tell(run)) == 1
    run[3] = run[3]._replace(back_to=1)
    assert tell(run) == []


def test_a_rate_is_advised_as_the_config_has_it_and_discarded_rounds_do_not_count():
    negative = {"fresh_margin": -0.2, "fresh_margin/low": -0.3, "fresh_margin/high": -0.1}
    run = make_run({0: 20, 3: 20}, **negative)
    run[1:3] = [run[1]._replace(back_to=0), run[2]._replace(back_to=0, factor=0.5)]
    run[3] = run[3]._replace(factor=0.25)
    ((round, hint),) = tell(run)
    assert (round, hint.suits) == (3, "optimizer.learning_rate=1e-06")
    assert hint.text.endswith(
        "try --config.optimizer.learning_rate=1e-06, here (a resume takes it, times 0.25 for the "
        "guard's retries), or 2.5e-07 in the next run"
    )
    high = make_run({0: 10, 1: 30, 2: 20})
    assert "fell from 0.300 after round 1" in advice.find_excess(high)
    high[1] = high[1]._replace(back_to=0)
    assert advice.find_excess(high) == "", "round 1 is not what round 2 goes on from"


def test_a_hint_is_given_again_only_if_it_changes():
    run = make_run({0: 20, 5: 20}, tied_share=0.6)
    assert [round for round, _ in tell(run)] == [1]
    assert [len(list_hints(CONFIG, run[:count])) for count in range(2, 7)] == [1] * 5
    # Later the rate is halved by hand, and that is not enough.
    negative = {"fresh_margin": -0.2, "fresh_margin/low": -0.3, "fresh_margin/high": -0.1}
    run = make_run({0: 20, 5: 20}, rate=4e-6, **negative)
    run[4:] = [one._replace(rate=2e-6) for one in run[4:]]
    assert [(round, hint.suits) for round, hint in tell(run)] == [
        (1, "optimizer.learning_rate=2e-06"),
        (4, "optimizer.learning_rate=1e-06"),
    ]


def test_nothing_is_said_of_round_0_and_of_runs_without_signs():
    assert tell(make_run({0: 20})) == []
    assert tell([RoundSigns(0, 0, 1e-6, {}), RoundSigns(1, 128, 1e-6, {})]) == []


def test_every_threshold_says_where_it_is_from():
    assert all(len(one.source) > 20 for one in THRESHOLDS.values())


def test_a_report_reads_the_signs_of_each_round_once(monkeypatch):
    """Reports of a run of many rounds would else take long beside a round."""
    run, counts = make_run({0: 10.0, 40: 20.0}), []

    def count(config, done):
        counts.append(len(done))
        return []

    monkeypatch.setattr(advice, "list_hints", count)
    assert list_new_hints(CONFIG, run) == [[]] * 41
    assert counts == list(range(2, 42))
    assert list_new_hints(CONFIG, run[:1]) == [[]]


def test_no_two_pieces_of_advice_contradict_each_other():
    """Rounds of so few steps that shorter ones are warned of are not to be shorter."""
    stale = {"stale_ess": 0.2, "stale_kl": 0.9}
    for steps, wanted in ((1, "rate"), (7, "rate"), (8, "prompts")):
        run = make_run({0: 20.0, 1: 20.0}, rate=2e-6, steps=steps, **stale)
        hints = {hint.about: hint.suits for hint in list_hints(CONFIG, run)}
        kind = "optimizer.learning_rate=1e-06" if wanted == "rate" else "rounds.prompts_per_round"
        assert hints["staleness"].startswith(kind) and "steps" not in hints
    [hint] = list_hints(CONFIG, make_run({0: 20.0, 1: 20.0}, steps=7, **stale))
    assert hint.text.startswith("rounds are short (7 optimizer steps), but at the end of the round")
    half = RoundSize(64, 128, 8 // 2)
    assert find_traps(CONFIG, [half]) == [] and half.steps == FEW_STEPS
