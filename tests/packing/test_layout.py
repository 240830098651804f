"""Shapes waste little, and the plans of like rounds meet in the same ones."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from halos_jax.packing.batches import build_batch, count_steps, plan_batches
from halos_jax.packing.layout import LayoutMemory, round_shape
from halos_jax.types import CHOSEN, REJECTED, Item


def draw_plan(number, *, median=150, **options):
    """Return the plan of 512 random pairs."""
    rng = np.random.default_rng(number)

    def draw():
        sizes = np.clip(rng.lognormal(np.log(median), 0.6, 3), 4, 512).astype(int)
        prompt, *responses = (np.ones(size, np.int32) for size in sizes)
        return Item(prompt, tuple(responses), (CHOSEN, REJECTED))

    items = [draw() for _ in range(512)]
    settings = {"batch_size": 32, "num_rows": 1, "tokens_per_row": 16384, "seed": number}
    return items, plan_batches(items, **(settings | {"known": ()} | options))


def test_shapes_recur_between_the_plans_of_like_rounds():
    layouts = collections.Counter()
    for number in range(10):
        _, plan = draw_plan(number)
        layouts[plan.layout] += 1
        assert plan.fill > 0.75
    assert len(layouts) <= 7, "with exact shapes there would be 10"


def test_a_plan_that_does_not_recur_wastes_next_to_nothing():
    items, plan = draw_plan(0, known=None)
    _, recurring = draw_plan(0)
    assert plan.fill > 0.95 > recurring.fill
    assert plan.layout.num_entries < recurring.layout.num_entries
    view = [sum(len(i.prompt_ids) + len(r) for i in items[:512] for r in i.responses) / len(plan)]
    assert plan.layout.num_entries * plan.layout.microbatches < 1.4 * view[0]


def test_a_layout_grows_until_all_like_rounds_fit_into_it():
    layouts, known = [], ()
    for number in range(10):
        items, plan = draw_plan(number, known=known)
        known = (plan.layout,)
        layouts.append(plan.layout)
        assert plan.fill > 0.7
        for step in range(len(plan)):
            build_batch(items, plan, step)  # everything has its place, or this fails
    assert len(set(layouts)) <= 4
    assert all(after.tokens >= before.tokens for before, after in itertools.pairwise(layouts))
    assert len(set(layouts[4:])) == 1


def test_a_layout_that_would_waste_much_is_not_taken_over():
    _, long = draw_plan(0)
    _, short = draw_plan(1, median=40)
    _, after = draw_plan(1, median=40, known=[long.layout])
    assert after.layout == short.layout != long.layout
    _, other = draw_plan(0, known=[dataclasses.replace(long.layout, rows=2)])
    assert other.layout == long.layout


def test_the_first_known_layout_that_will_do_is_taken():
    (_, long), (_, short) = draw_plan(0), draw_plan(1, median=40)
    for median, expected in ((150, long), (40, short)):
        _, again = draw_plan(
            0 if median == 150 else 1, median=median, known=[short.layout, long.layout]
        )
        assert again.layout == expected.layout


def test_the_memory_survives_json_and_forgets_the_oldest():
    memory, again = LayoutMemory(), LayoutMemory()
    layout = draw_plan(0)[1].layout
    layouts = [dataclasses.replace(layout, tokens=tokens) for tokens in range(1, 7)]
    for layout in layouts:
        memory.keep("train", layout)
    memory.keep("train", layouts[4])
    again.load(json.loads(json.dumps(memory.to_record())))
    assert again.find("train") == memory.find("train")
    assert memory.find("train")[0] == layouts[4] and len(memory.find("train")) == 4
    assert layouts[0] not in memory.find("train") and memory.find("other") == ()


@pytest.mark.parametrize(("parts", "waste"), [(2, 1 / 2), (4, 1 / 4), (8, 1 / 8)])
def test_round_shape_wastes_little_and_never_shrinks(parts, waste):
    for multiple in (1, 8, 24, 128):
        rounded = [round_shape(size, multiple, parts=parts) for size in range(1, 3000)]
        assert rounded == sorted(rounded)
        for size, got in enumerate(rounded, 1):
            assert got >= size and got % multiple == 0
            assert got - size < size * waste + multiple
    assert len({round_shape(size, 1, parts=parts) for size in range(1025, 2049)}) == parts


def test_shorter_rows_take_over_no_longer_ones():
    """A run that is carried on with less memory has known rows that it no longer may have."""
    _, before = draw_plan(0, tokens_per_row=16384)
    limit = before.layout.tokens - 128
    options = {"tokens_per_row": limit, "known": [before.layout]}
    _, after = draw_plan(0, **options)
    assert after.layout.microbatches == before.layout.microbatches, "or it would fit in any case"
    assert after.layout.tokens <= limit
    assert [sorted(itertools.chain(*step)) for step in after.steps] == [
        sorted(itertools.chain(*step)) for step in before.steps
    ]
    _, same = draw_plan(0, tokens_per_row=before.layout.tokens, known=[before.layout])
    assert same.layout == before.layout


def test_what_follows_an_earlier_end_leaves_the_steps_before_as_they_were():
    items, before = draw_plan(0, batch_size=7, max_items=100)
    cut = [100]
    longer = plan_batches(
        items, batch_size=7, num_rows=1, tokens_per_row=16384, seed=0, max_items=180, cuts=cut
    )
    flat = [[sorted(itertools.chain(*step)) for step in plan.steps] for plan in (before, longer)]
    assert flat[1][: len(before)] == flat[0]
    taken = list(itertools.chain(*flat[1]))
    assert len(taken) == len(set(taken)) == 180
    assert len(longer) == count_steps(512, batch_size=7, max_items=180, cuts=cut)
    without = plan_batches(
        items, batch_size=7, num_rows=1, tokens_per_row=16384, seed=0, max_items=180
    )
    assert [sorted(itertools.chain(*step)) for step in without.steps][: len(before)] != flat[0]
