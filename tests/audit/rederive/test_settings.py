"""The config that a run had at an earlier place."""

import dataclasses

import pytest

from halos_jax.audit.rederive import settings
from halos_jax.config import Config, ConfigError, OptimizerConfig, SamplingConfig

CONFIG = Config(optimizer=OptimizerConfig(learning_rate=3e-6), sampling=SamplingConfig(slots=64))
SEGMENTS = (
    {"round": 2, "step": 8, "changed": {"optimizer.learning_rate": [1e-6, 2e-6]}},
    {"round": 2, "step": 11, "changed": {"optimizer.learning_rate": [2e-6, 3e-6]}},
    {
        "round": 4,
        "step": 30,
        "changed": {"sampling.slots": [32, 64], "data.train": ["12 prompts", "20 prompts"]},
    },
)


@pytest.mark.parametrize(
    ("place", "rate", "slots"),
    [
        ((1, 0), 1e-6, 32),
        ((2, 7), 1e-6, 32),
        ((2, 8), 2e-6, 32),
        ((3, 16), 3e-6, 32),
        ((4, 30), 3e-6, 64),
    ],
)
def test_changes_after_a_place_are_undone(place, rate, slots):
    found = settings.undo_changes(CONFIG, SEGMENTS, place)
    assert (found.optimizer.learning_rate, found.sampling.slots) == (rate, slots)
    again = dataclasses.replace(found, optimizer=CONFIG.optimizer, sampling=CONFIG.sampling)
    assert again == CONFIG


def test_a_change_within_a_round_is_where_its_steps_end():
    assert settings.find_break(SEGMENTS, (2, 8)) == 11
    assert settings.find_break(SEGMENTS, (2, 11)) is None
    assert settings.find_break(SEGMENTS, (4, 30)) is None
    assert settings.list_before(SEGMENTS, (2, 8)) == SEGMENTS[:1]


def test_prompts_that_were_added_later_do_not_count():
    assert settings.count_prompts((12, 8), SEGMENTS, (3, 16)) == 12
    assert settings.count_prompts((12, 8), SEGMENTS, (4, 30)) == 20


def test_a_value_of_another_version_is_refused():
    segments = ({"round": 2, "step": 0, "changed": {"sampling.slots": ["many", 64]}},)
    with pytest.raises(ConfigError, match=r"sampling\.slots: got 'many'"):
        settings.undo_changes(CONFIG, segments, (1, 0))
