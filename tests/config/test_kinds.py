"""The tables of kinds of rewards, feedback and items."""

import dataclasses
import typing

import pytest

from halos_jax.config import Config, RewardConfig, schema
from halos_jax.config.kinds import (
    FEEDBACK_TYPES,
    ITEM_KINDS,
    REWARD_KINDS,
    FeedbackType,
    ItemKind,
    RewardKind,
)
from halos_jax.config.tasks import load
from halos_jax.losses import list_losses

TABLES = {RewardKind: REWARD_KINDS, FeedbackType: FEEDBACK_TYPES, ItemKind: ITEM_KINDS}


@pytest.mark.parametrize("names", TABLES, ids=["rewards", "feedback", "items"])
def test_every_name_has_its_row_and_every_function_exists(names):
    table = TABLES[names]
    assert tuple(table) == typing.get_args(names)
    named = [
        value
        for row in table.values()
        for field in dataclasses.fields(row)
        if isinstance(value := getattr(row, field.name), str) and ":" in value
    ]
    assert len(named) == 2 * len(table)
    for name in named:
        assert callable(load(name)), name


def test_the_names_that_rows_hold_exist():
    fields = schema.leaf_types(RewardConfig)
    for reward in REWARD_KINDS.values():
        assert not reward.needs or reward.needs in fields
        assert all(any(path.startswith(name) for path in fields) for name in reward.reads)
    for feedback in FEEDBACK_TYPES.values():
        assert set(feedback.single_losses) <= set(list_losses())
    for item in ITEM_KINDS.values():
        assert set(item.feedback) <= set(FEEDBACK_TYPES)
        assert not item.scored_as or item.scored_as in ITEM_KINDS


def test_how_many_examples_feedback_can_have():
    counts = {
        (name, mode): row.count(5, 4, mode)
        for name, row in FEEDBACK_TYPES.items()
        for mode in ("random", "max", "min", "all")
    }
    assert [counts["pairwise", mode] for mode in ("random", "max", "min", "all")] == [10, 5, 5, 30]
    assert (counts["binary", "max"], counts["scalar", "max"]) == (20, 5)
    assert schema.leaf_types(Config)["feedback.type"] is FeedbackType
