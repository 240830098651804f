"""What targets were drawn from, as arrays of a batch."""

import dataclasses

import numpy as np
import pytest

from halos_jax.config import ConfigError
from halos_jax.drawn import Drawn
from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.packing.layout import LayoutMemory
from halos_jax.packing.transforms import NO_SETS, NOTHING, list_transforms, measure_kept
from halos_jax.types import MEMBER, Item


def draw_from(sets, heat=0.7):
    kept = np.array([one for ids in sets for one in ids], "<i4").tobytes()
    return Drawn(heat, (-0.5,) * len(sets), tuple(map(len, sets)), kept)


def make_items(seed=0, most=5):
    rng = np.random.default_rng(seed)

    def draw():
        sets = [np.sort(rng.permutation(50)[: rng.integers(1, most)]) for _ in range(4)]
        sets = sets[: rng.integers(1, 5)]
        return np.array([ids[0] for ids in sets], np.int32), draw_from(sets, rng.integers(1, 5) / 2)

    items = []
    for _ in range(6):
        responses, drawn = zip(draw(), draw())
        prompt = rng.integers(1, 50, rng.integers(1, 9)).astype(np.int32)
        items.append(Item(prompt, responses, (MEMBER,) * 2, drawn=drawn))
    return items


PLAIN = [dataclasses.replace(item, drawn=()) for item in make_items()]
BARE = [
    dataclasses.replace(item, drawn=tuple(Drawn(0.7, one.logps) for one in item.drawn))
    for item in make_items()
]


@pytest.mark.parametrize("num_rows, tokens_per_row", [(1, 1000), (2, 40)])
def test_every_target_of_a_batch_has_its_own_temperature_and_set(num_rows, tokens_per_row):
    items = make_items()
    plan = plan_batches(
        items, batch_size=6, num_rows=num_rows, tokens_per_row=tokens_per_row, row_multiple=8
    )
    assert plan.layout.kept == 8
    batch = build_batch(items, plan, 0)
    heats = dict(split_logps(plan, 0, items, batch.transform.temperature))
    kept = batch.transform.kept.transpose(3, 0, 1, 2)
    tables = [dict(split_logps(plan, 0, items, column)) for column in kept]
    for index, item in enumerate(items):
        for number, one in enumerate(item.drawn):
            assert (heats[index][number] == np.float32(one.temperature)).all()
            columns = [table[index][number] for table in tables]
            np.testing.assert_array_equal(np.stack(columns, axis=-1), one.tabulate(8))
    assert (batch.transform.temperature[~batch.is_response] == 1).all()
    assert (batch.transform.kept[~batch.is_response] == -1).all()


def test_items_from_the_policy_itself_have_a_batch_without_a_transform():
    plan = plan_batches(PLAIN, batch_size=6, num_rows=1, tokens_per_row=1000)
    assert plan.layout.kept == NOTHING
    assert build_batch(PLAIN, plan, 0).transform is None
    plan = plan_batches(BARE, batch_size=6, num_rows=1, tokens_per_row=1000)
    assert plan.layout.kept == NO_SETS
    transform = build_batch(BARE, plan, 0).transform
    assert transform.kept is None
    assert (np.unique(transform.temperature) == np.float32([0.7])).all()


def test_targets_alone_are_listed():
    item = make_items()[0]
    masks = (np.zeros(len(item.responses[0]), bool), np.ones(len(item.responses[1]), bool))
    fields = list_transforms([dataclasses.replace(item, masks=masks)], 8)
    np.testing.assert_array_equal(fields["kept"], item.drawn[1].tabulate(8))
    assert (fields["temperature"] == item.drawn[1].temperature).all()


def test_the_width_is_a_power_of_two_that_holds_the_largest_set():
    for most, width in ((2, 8), (8, 8), (9, 16), (16, 16), (17, 32)):
        item = dataclasses.replace(PLAIN[0], drawn=(draw_from([range(most)]),) * 2)
        assert measure_kept([item]) == width


def test_a_part_that_says_what_it_was_drawn_from_is_refused():
    with pytest.raises(ConfigError, match="2 of 6 examples do not say what"):
        measure_kept(PLAIN[:2] + make_items()[2:])
    with pytest.raises(ConfigError, match="2 of 12 responses were drawn from all tokens"):
        measure_kept(BARE[:1] + make_items()[1:])


def test_layouts_recur_with_wider_sets_and_records_without_sets_stay_as_they_were():
    memory = LayoutMemory()
    narrow, wide = make_items(), make_items(most=20)

    def plan(items):
        known = memory.find("train")
        made = plan_batches(items, batch_size=6, num_rows=1, tokens_per_row=1000, known=known)
        memory.keep("train", made.layout)
        return made.layout

    first, second, third = plan(narrow), plan(wide), plan(narrow)
    assert (first.kept, second.kept, third.kept) == (8, 32, 32)
    assert dataclasses.replace(first, kept=32) == second == third
    assert plan(PLAIN).kept == NOTHING and plan(BARE).kept == NO_SETS
    record = memory.to_record()
    assert ["kept" in one for one in record["train"]] == [True, False, True, True]
    other = LayoutMemory()
    other.load(record)
    assert other.find("train") == memory.find("train")
