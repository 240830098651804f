"""The schedule: waves of prompts, and slots that are filled, released and given up."""

import numpy as np
import pytest

from halos_jax.sampling.schedule import (
    Draft,
    choose_kept,
    fill_slots,
    has_idle,
    is_busy,
    plan_waves,
    release_slots,
)
from halos_jax.types import FINISH_STOP, Prompt, Turn


def make_drafts(*lengths, samples=2):
    """Return drafts of prompts of so many tokens each: 1, 2, 3, ..."""
    return [
        Draft(
            Prompt(f"p{number}", (Turn("user", "x"),)),
            tuple(range(1, length + 1)),
            sample_id,
            number,
            key=np.array([number, sample_id], np.uint32),
        )
        for number, length in enumerate(lengths)
        for sample_id in range(samples)
    ]


def names(drafts):
    return [draft and (draft.prompt_number, draft.sample_id) for draft in drafts]


def test_waves_hold_each_prompt_once_without_its_last_token():
    first, second = plan_waves(make_drafts(3, 1, 4), size=2, length=5)
    assert (first.first, second.first) == (0, 2)
    np.testing.assert_array_equal(first.tokens, [[1, 2, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(first.lengths, [2, 0])
    np.testing.assert_array_equal(second.tokens, [[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])  # padded
    np.testing.assert_array_equal(second.lengths, [3, 0])
    assert names(first.waiting) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert names(second.waiting) == [(2, 0), (2, 1)]


def test_idle_slots_are_filled_from_the_first_in_the_order_of_the_drafts():
    drafts = make_drafts(2, 2)
    (wave,) = plan_waves(drafts, size=2, length=2)
    owners = [None, drafts[0], None]
    wave.waiting.popleft()
    assert [(slot, *names([draft])) for slot, draft in fill_slots(owners, wave)] == [
        (0, (0, 1)),
        (2, (1, 0)),
    ]
    assert names(owners) == [(0, 1), (0, 0), (1, 0)] and names(wave.waiting) == [(1, 1)]
    assert not has_idle(owners) and is_busy(owners)
    assert fill_slots(owners, wave) == []
    owners = [None] * 3
    assert len(fill_slots(owners, wave)) == 1 and names(owners) == [(1, 1), None, None]
    assert has_idle(owners) and not is_busy([None]) and not wave.waiting


def test_slots_are_released_by_what_was_read_or_by_the_number_of_steps():
    stopped, full, under_way = make_drafts(2, 2, 2, samples=1)
    stopped.finish_reason, stopped.steps = FINISH_STOP, 3
    full.steps, under_way.steps = 8, 7
    owners = [stopped, None, full, under_way]
    # The device knows of the limit, but not of stop strings.
    np.testing.assert_array_equal(release_slots(owners, 8), [True, False, False, False])
    assert owners == [None, None, None, under_way]


@pytest.mark.parametrize(
    ("slots", "busy", "factor", "row_shards", "kept"),
    [
        (64, [5], 2, 1, 16),  # never below 16
        (64, list(range(17)), 2, 1, 32),
        (64, list(range(33)), 2, 1, 64),
        (64, [5], 0, 1, 64),  # switched off
        (64, [5], 4, 1, 16),
        (40, [39], 2, 8, 16),  # 20 becomes 24, 12 becomes 16
        (16, [], 2, 1, 16),
    ],
)
def test_fewer_slots_are_kept_the_busy_ones_first(slots, busy, factor, row_shards, kept):
    (draft,) = make_drafts(2, samples=1)
    owners = [draft if slot in busy else None for slot in range(slots)]
    found = choose_kept(owners, factor, row_shards)
    assert len(found) == kept == len(set(found))
    assert set(busy) <= set(found)
    if kept < slots:
        assert found[: len(busy)] == busy
    else:
        assert found == list(range(slots))
