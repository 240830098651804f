import itertools

import pytest

from halos_jax.config import FeedbackConfig
from halos_jax.rounds.budget import (
    Budget,
    RoundPlan,
    describe_shortage,
    expect_examples,
    expect_steps,
    list_examples,
)


def test_the_typical_run_has_four_equal_rounds():
    budget = Budget(total_prompts=2048, prompts_per_round=512)
    assert budget.num_rounds == 4
    plans = [budget.plan_round(round, 10_000) for round in range(1, 6)]
    ranges = [(plan.start, plan.stop) for plan in plans[:4]]
    assert ranges == [(0, 512), (512, 1024), (1024, 1536), (1536, 2048)]
    assert plans[4].is_empty


def test_a_last_partial_round_is_included():
    budget = Budget(total_prompts=10, prompts_per_round=4, num_skip=3)
    assert budget.num_rounds == 3
    assert budget.plan_round(3, 100) == RoundPlan(11, 13)
    assert budget.plan_round(3, 100).num_prompts == 2


def test_rounds_use_each_prompt_once_in_order_and_end_cleanly():
    sizes = itertools.product(range(1, 12), range(1, 7), range(4), range(18))
    for total, per_round, skip, available in sizes:
        budget = Budget(total, per_round, skip)
        plans = [budget.plan_round(round, available) for round in range(1, budget.num_rounds + 3)]
        used = [index for plan in plans for index in range(plan.start, plan.stop)]
        # Brute force: what a single pass over the order, cut by the budget, would use.
        assert used == list(range(available))[skip:][:total]
        full = [plan.num_prompts for plan in plans if not plan.is_empty]
        assert all(count == per_round for count in full[:-1])
        assert all(count <= per_round for count in full[-1:])
        empty = [plan.is_empty for plan in plans]
        assert empty == sorted(empty), "a round after an empty one had prompts"
        assert all(empty[budget.num_rounds :])


def test_stop_is_the_next_num_skip():
    budget = Budget(total_prompts=7, prompts_per_round=3)
    for round in range(1, 3):
        stop = budget.plan_round(round, 100).stop
        assert budget.plan_round(round + 1, 100).start == stop


def test_round_zero_has_no_prompts_to_plan():
    with pytest.raises(ValueError, match="rounds from 1"):
        Budget(4, 2).plan_round(0, 10)


@pytest.mark.parametrize(
    ("feedback", "items", "expected"),
    [
        (FeedbackConfig(), "pair", 10),
        (FeedbackConfig(mode="random"), "pair", 20),
        (FeedbackConfig(mode="all"), "pair", 100),
        (FeedbackConfig(mode="max"), "unpaired", 20),
        (FeedbackConfig(type="binary"), "unpaired", 50),
        (FeedbackConfig(type="scalar"), "group", 10),
    ],
)
def test_schedules_know_how_many_examples_a_round_gives(feedback, items, expected):
    assert expect_examples(10, 5, feedback, items) == expected


def test_rounds_that_were_begun_stay_and_the_next_follow():
    """A last round of 2 prompts, then a larger budget."""
    before = Budget(total_prompts=10, prompts_per_round=8)
    assert [before.plan_round(round, 100).stop for round in (1, 2, 3)] == [8, 10, 10]
    after = Budget(total_prompts=30, prompts_per_round=8, opened=((0, 8), (8, 10)))
    plans = [after.plan_round(round, 100) for round in range(1, after.num_rounds + 1)]
    assert [(plan.start, plan.stop) for plan in plans] == [
        (0, 8),
        (8, 10),
        (10, 18),
        (18, 26),
        (26, 30),
    ]
    assert after.count_rounds(100) == 5 and after.count_rounds(18) == 3
    same = Budget(total_prompts=30, prompts_per_round=8, opened=((0, 8),))
    assert [same.plan_round(n, 100) for n in range(1, 5)] == [
        Budget(30, 8).plan_round(n, 100) for n in range(1, 5)
    ]


def test_steps_are_counted_by_round_and_never_rounded_down():
    budget = Budget(total_prompts=20, prompts_per_round=8)
    counted = []

    def count(available, epochs=1):
        return expect_steps(
            budget,
            available,
            examples=lambda prompts: counted.append(prompts) or 3 * prompts // 2,
            batch_size=8,
            epochs=lambda round: epochs,
        )

    # 12, 12 and 6 examples in steps of about 8: 12 / 8 is 1.5, which is two steps.
    assert count(100) == 2 + 2 + 1 and counted == [8, 8, 4]
    assert count(100, epochs=3) == 3 * 5
    assert count(9) == 2 + 1  # the round of one prompt takes a step as well
    assert count(8) == 2


def test_fewer_prompts_than_the_budget_are_said():
    assert describe_shortage(Budget(16, 8), 16) is None
    assert describe_shortage(Budget(64, 8), 10).startswith(
        "data.train: 10 prompts are enough for 2 of 8 rounds (rounds.total_prompts=64): the run"
    )
    assert "10 prompts after rounds.num_skip=4 are enough for 2 of" in describe_shortage(
        Budget(64, 8, 4), 14
    )


def test_replayed_examples_are_expected_where_there_are_earlier_ones():
    budget = Budget(total_prompts=26, prompts_per_round=8)
    # Of 16 examples a round, with as many again from the second round on; the last has 4.
    assert list_examples(budget, 100, lambda count: 2 * count, 0.5) == [16, 32, 32, 8]
    assert list_examples(budget, 100, lambda count: 2 * count, 0.75) == [16, 16 + 16, 16 + 32, 16]
    assert list_examples(budget, 100, lambda count: 2 * count, 0.0) == [16, 16, 16, 4]
    settings = {"examples": lambda count: 2 * count, "batch_size": 4, "epochs": lambda round: 1}
    assert expect_steps(budget, 100, **settings, replay=0.5) == 4 + 8 + 8 + 2
    assert expect_steps(budget, 100, **settings) == 4 + 4 + 4 + 1


def test_passes_that_the_budget_does_not_reach_and_those_that_are_too_few_are_said():
    assert describe_shortage(Budget(30, 8), 10, 3) is None
    assert describe_shortage(Budget(21, 8), 10, 3) is None, "it ends in the third pass"
    assert describe_shortage(Budget(20, 8), 10, 3) == (
        "rounds.passes: got 3, but rounds.total_prompts=20 ends in pass 2 over the 10 prompts of "
        "data.train; for all passes set --config.rounds.total_prompts=30"
    )
    assert "ends in pass 1 over" in describe_shortage(Budget(6, 8, 4), 10, 3)
    short = describe_shortage(Budget(64, 8, 4), 10, 3)
    assert short.startswith(
        "data.train: 26 prompts in 3 passes after rounds.num_skip=4 are enough for 4 of 8 rounds"
    )
    # All passes have the same prompts: see `order.refuse_late`.
    assert "add prompts, before the second pass begins, or lower" in short
    assert "add prompts, now or once it has ended, or" in describe_shortage(Budget(64, 8), 10)


def test_rounds_may_have_any_size_and_each_begins_where_the_last_one_ended():
    budget = Budget(total_prompts=20, prompts_per_round=8, num_skip=2)
    assert budget.end(100) == 22 and budget.end(9) == 9
    assert budget.plan_next(1, 3, 100) == RoundPlan(2, 5)
    budget = budget.open(1, 2, 5)
    assert budget.opened == ((2, 5),)
    # 17 prompts are left: rounds of 8, 8 and 1 are expected.
    assert budget.num_rounds == budget.count_rounds(100) == 4
    assert budget.plan_next(2, 12, 100) == RoundPlan(5, 17)
    budget = budget.open(2, 5, 17)
    assert budget.plan_next(3, 12, 100) == RoundPlan(17, 22)  # what is left of the budget
    assert budget.plan_next(3, 12, 18) == RoundPlan(17, 18)  # of the prompts
    assert budget.open(3, 17, 22).plan_next(4, 1, 100).is_empty
    assert budget.plan_next(3, 1, 17).is_empty
    # A round that is opened once more, because its samples were forgotten, stands alone.
    assert budget.open(2, 5, 6).opened == ((2, 5), (5, 6))
    assert budget.open(1, 2, 4).opened == ((2, 4),)
    assert budget.plan_next(2, 4, 100) == RoundPlan(5, 9)


def test_the_share_that_is_used_counts_the_prompts_of_the_run():
    budget = Budget(total_prompts=20, prompts_per_round=8, num_skip=4)
    assert budget.measure(4, 9, 100) == (0.0, 0.25)
    assert budget.measure(9, 24, 100) == (0.25, 1.0)
    assert budget.measure(9, 14, 14) == (0.5, 1.0)  # there are 10 prompts for it
