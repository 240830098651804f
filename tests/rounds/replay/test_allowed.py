"""The combinations with feedback.replay that are refused."""

import pytest

from halos_jax.config import Config, schema
from halos_jax.rounds.replay.allowed import check_replay


def refuse(**changes):
    values = dict(schema.flatten(schema.to_plain(Config())))
    values |= {"loss.name": "dpo", "feedback.replay": 0.25}
    return list(check_replay(values | {name.replace("__", "."): changes[name] for name in changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "label"}, "feedback.replay: got 0.25, allowed with task='label': 0"),
        ({"rounds__total_prompts": 512}, "rounds.total_prompts=512 are one round, with none"),
        ({"loss__name": "ppo"}, "feedback.replay: got 0.25, allowed with loss 'ppo': 0"),
    ],
)
def test_each_combination_has_its_error(changes, expected):
    (line,) = refuse(**changes)
    assert expected in line
    assert refuse(**changes, feedback__replay=0.0) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss__name": "kto"},
        {"loss__name": "grpo"},
        {"loss__name": "gkd"},
        {"loss__name": "no such loss"},
        {"rounds__total_prompts": 512, "rounds__prompts_per_round": "auto"},
    ],
)
def test_others_are_allowed(changes):
    assert refuse(**changes) == []
