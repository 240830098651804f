"""Which rounds break a bound, and what the run then does."""

import math
from types import SimpleNamespace

import pytest

from halos_jax.config import GuardConfig
from halos_jax.course.guard import find_beyond, find_return, is_on, judge
from halos_jax.course.verdicts import NO_VERDICT, Broken, Verdict


def make_rounds(*metrics, **decisions):
    """Return rounds 0, 1, ... with these metrics; `r3={...}` is the guard's decision of round 3."""
    return [
        SimpleNamespace(
            round=round,
            metrics=one,
            decisions={"guard": decisions[f"r{round}"]} if f"r{round}" in decisions else {},
        )
        for round, one in enumerate(metrics)
    ]


def judge_last(settings, *metrics, best=0, **decisions):
    return judge(GuardConfig(**settings), make_rounds(*metrics, **decisions), best=best)


def kl(*values):
    return [{}, *({"kl_sft": value} for value in values)]


@pytest.mark.parametrize(
    ("settings", "metrics", "value"),
    [
        ({"max_kl": 10}, [{}, {"kl_sft": 10.5}], 10.5),
        ({"max_kl": 10}, [{}, {"kl_sft": 10}], None),
        ({"max_kl": 10}, [{}, {"kl_sampled": 11}], 11),
        ({"max_kl": 10}, [{}, {"kl_sft": 9, "kl_sampled": 11}], None),
        ({"max_kl": 10}, [{}, {"kl_sft": -11}], None),
        ({"max_kl": 10}, [{}, {"kl_sft": math.nan}], None),
        ({"max_kl": 10}, [{"kl_sft": 11}, {}], None),  # the SFT policy is not judged
        ({}, [{}, {"kl_sft": 1e9}], None),
        ({"min_margin": 0.0}, [{}, {"fresh_margin": -0.1}], -0.1),
        ({"min_margin": 0.0}, [{}, {"fresh_margin": 0.0}], None),
        ({"min_margin": -0.2}, [{}, {"fresh_margin": -0.1}], None),
        ({}, [{}, {"fresh_margin": -0.1}], None),
        ({"max_truncated": 0.5}, [{}, {"truncated": 6, "samples": 10}], 0.6),
        ({"max_truncated": 0.5}, [{}, {"truncated": 5, "samples": 10}], None),
        ({"max_truncated": 0.5}, [{}, {"truncated": 0, "samples": 0}], None),
        ({"max_truncated": 0.5}, [{}, {}], None),
        ({}, [{}, {"truncated": 10, "samples": 10}], None),
    ],
)
def test_each_bound_looks_at_its_metric(settings, metrics, value):
    verdict = judge_last({"fall": False, **settings}, *metrics)
    if value is None:
        assert verdict == NO_VERDICT
    else:
        (name, limit), *_ = settings.items()
        assert verdict == Verdict("warn", (Broken(f"guard.{name}", (1,), (value,), limit),))


@pytest.mark.parametrize(("length", "broken"), [(130, True), (120, False), (70, True), (85, False)])
def test_the_length_is_compared_with_that_of_round_1(length, broken):
    lengths = [{"response_tokens_mean": one} for one in (500, 100, 110, length)]
    verdict = judge_last({"max_length_change": 0.25, "fall": False}, *lengths)
    assert (verdict.action == "warn") == broken
    if broken:
        assert verdict.broken[0].values == pytest.approx((length / 100 - 1,))
        assert verdict.broken[0].limit == 0.25


def test_a_scorer_falls_against_its_own_highest_mean():
    def scores(value, half):
        name = "reward_eval/right"
        return {name: value, f"{name}/low": value - half, f"{name}/high": value + half}

    settings = {"scorer": "right", "fall": False}
    before = [scores(0.2, 0.03), scores(0.5, 0.03), scores(0.4, 0.03)]
    verdict = judge_last(settings, *before, scores(0.35, 0.04))
    # Of three means before it the highest, whose interval and its own make 0.05, widened for three.
    half = 0.05 * 2.3940 / 1.95996
    assert verdict.action == "warn" and verdict.broken[0].bound == "guard.scorer"
    assert verdict.broken[0].values == pytest.approx((-0.15,))
    assert verdict.broken[0].intervals[0] == pytest.approx((-0.15 - half, -0.15 + half), rel=1e-4)
    assert judge_last(settings, *before, scores(0.45, 0.04)) == NO_VERDICT
    assert judge_last(settings, *before, {"reward_eval/right": 0.1}) == NO_VERDICT  # no interval
    assert judge_last({"fall": False}, *before, scores(0.1, 0.01)) == NO_VERDICT


def test_a_fall_of_the_held_out_reward_is_beyond_its_interval():
    def change(high):
        return {"reward_change": {"than": 0, "value": -0.1, "low": -0.2, "high": high}}

    broken = Broken("guard.fall", (1,), (-0.1,), None, ((-0.2, -0.01),))
    assert judge_last({}, {}, {}, r1=change(-0.01)) == Verdict("warn", (broken,))
    assert judge_last({}, {}, {}, r1=change(0.0)) == NO_VERDICT
    assert judge_last({"fall": False}, {}, {}, r1=change(-0.01)) == NO_VERDICT
    assert judge_last({}, {}, {}, {}, r1=change(-0.01)) == NO_VERDICT  # round 2 was not evaluated


@pytest.mark.parametrize(
    ("values", "rounds"),
    [
        ([11, 12], (1, 2)),
        ([11, 9, 12], None),
        ([9, 11, 12], (2, 3)),
        ([11, 12, 9], None),
        ([12], None),
        ([11, None, 12], (1, 3)),  # a round of which nothing is known
        ([11, 12, None], None),  # it is not said again
    ],
)
def test_patience_asks_for_rounds_in_a_row(values, rounds):
    metrics = [{}, *({} if one is None else {"kl_sft": one} for one in values)]
    verdict = judge_last({"max_kl": 10, "patience": 2}, *metrics)
    assert (verdict.broken[0].rounds if verdict.broken else None) == rounds


def test_a_run_goes_back_to_the_best_round_and_stops_when_that_does_not_help():
    settings = {"max_kl": 10, "action": "retry", "rate_factor": 0.3, "max_retries": 2}
    back = {"action": "retry", "to": 1, "rate_factor": 0.3}
    first = judge_last(settings, *kl(1, 12), best=1)
    assert (first.action, first.to, first.rate_factor, first.retries) == ("retry", 1, 0.3, 0)
    second = judge_last(settings, *kl(1, 12, 13), best=1, r2=back)
    assert (second.action, second.retries) == ("retry", 1)
    third = judge_last(settings, *kl(1, 12, 13, 14), best=1, r2=back, r3=back)
    assert (third.action, third.to, third.rate_factor, third.retries) == ("stop", None, None, 2)
    assert judge_last({**settings, "max_retries": 0}, *kl(12)).action == "stop"
    # Back at the best round, the rounds before it do not count any more.
    patient = {**settings, "patience": 2}
    assert judge_last(patient, *kl(1, 12, 12, 13), r3=back) == NO_VERDICT
    assert judge_last(patient, *kl(1, 12, 12, 13, 14), r3=back).broken[0].rounds == (4, 5)


def scored(*rounds):
    """Return metrics of rounds 0, 1, ... from pairs of held-out reward and KL."""
    return [
        {name: one for name, one in zip(("reward_eval", "kl_sft"), pair, strict=True) if one}
        for pair in rounds
    ]


def go_back(metrics, *, kept=range(9), settings=None, **decisions):
    settings = GuardConfig(**(settings or {"max_kl": 1}))
    return find_return(settings, make_rounds(*metrics, **decisions), is_kept=kept.__contains__)


@pytest.mark.parametrize(
    ("rounds", "kept", "to"),
    [
        # The best, round 4, was trained from a policy that its own samples show beyond.
        ([(0.1, 0), (0.2, 0.1), (0.3, 0.4), (0.4, 0.8), (0.5, 1.1)], range(9), 2),
        ([(0.1, 0), (0.2, 0.1), (0.3, 0.4), (0.4, 0.8), (0.5, 1.1)], (1, 4), 1),
        ([(0.1, 0), (0.2, 0.1), (0.3, 0.4), (0.4, 0.8), (0.5, 0.9)], range(9), 4),
        # Round 2's samples are beyond, but round 3's show that its training has led back.
        ([(0.1, 0), (0.2, 0.1), (0.3, 1.2), (0.1, 0.9)], range(9), 2),
        ([(0.1, 0), (0.2, 0.1), (0.3, 1.2)], range(9), 0),
        ([(0.1, 0), (0.2, 1.2)], (), 0),  # round 0 is always there
        ([(0.3, 0), (0.2, 0.1), (0.1, 0.2)], range(9), 0),
        ([(0.1, 0), (None, 0.1), (0.3, 0.2), (0.2, 1.5)], range(9), 0),  # round 1: no evaluation
    ],
)
def test_a_run_goes_back_to_the_best_policy_that_is_not_known_to_be_beyond(rounds, kept, to):
    assert go_back(scored(*rounds), kept=kept) == to


def test_a_policy_is_measured_by_the_rounds_that_began_with_it():
    metrics = scored((0.1, 0), (0.2, 0.1), (0.3, 0.9), (0.4, 1.5), (0.2, 0.9), (0.1, 0.8))
    # Round 3's samples show round 2 beyond; the run goes back to 1, so round 4's are of round 1.
    back = {"action": "retry", "to": 1, "rate_factor": 0.5}
    settings = GuardConfig(max_kl=1)
    beyond = find_beyond(settings, make_rounds(*metrics, r3=back))
    limit = {"limit": 1.0}
    assert beyond == {
        2: (Broken("guard.max_kl", (3,), (1.5,), **limit),),
        3: (Broken("guard.max_kl", (3,), (1.5,), **limit),),  # nothing else is known of it
    }
    assert go_back(metrics, r3=back) == 1
    assert find_beyond(GuardConfig(), make_rounds(*metrics)) == {}


def test_a_scorer_tells_of_the_policy_of_its_round():
    def scores(reward, right):
        name = "reward_eval/right"
        return {"reward_eval": reward, name: right, f"{name}/low": right, f"{name}/high": right}

    metrics = [scores(0.1, 0.5), scores(0.2, 0.6), scores(0.3, 0.4)]
    assert go_back(metrics, settings={"scorer": "right"}) == 1
    assert go_back(metrics) == 2


def test_all_bounds_that_are_broken_are_named():
    verdict = judge_last(
        {"max_kl": 10, "min_margin": 0, "action": "stop"}, {}, {"kl_sft": 11, "fresh_margin": -1}
    )
    assert verdict.action == "stop"
    assert [one.bound for one in verdict.broken] == ["guard.max_kl", "guard.min_margin"]


@pytest.mark.parametrize(
    ("settings", "is_evaluated", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"fall": False}, True, False),
        ({"max_kl": 1}, False, True),
        ({"min_margin": 0.0}, False, True),
        ({"max_truncated": 0.9}, False, True),
        ({"max_length_change": 0.5}, False, True),
        ({"scorer": "x", "fall": False}, True, True),
    ],
)
def test_the_guard_is_on_where_there_is_something_to_break(settings, is_evaluated, expected):
    assert is_on(GuardConfig(**settings), is_evaluated=is_evaluated) == expected
