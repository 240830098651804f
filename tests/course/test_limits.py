"""Which settings of the guard are refused, since they could do nothing."""

import pytest

from halos_jax.config import Config, GuardConfig, RoundsConfig, schema
from halos_jax.course.limits import check_guard, warn_of_idle

HELD_OUT = {"data.holdout": 4}
ROUNDS = {"rounds.total_prompts": 30, "rounds.prompts_per_round": 8}  # four rounds
STOP = {"guard.action": "stop"}


def check(changes):
    values = dict(schema.flatten(schema.to_plain(Config())))
    assert changes.keys() <= values.keys() | {"loss.name"}
    return list(check_guard(values | {"loss.name": "dpo"} | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"guard.max_kl": 10.0, "rounds.watch_samples": 0},
            "guard.max_kl: got 10, but rounds.watch_samples=0 leaves the KL of every round unknown",
        ),
        (
            {"guard.min_margin": 0.0, "rounds.watch_samples": 0, "loss.name": "simpo"},
            "guard.min_margin: got 0.0, but rounds.watch_samples=0 with a loss that needs no",
        ),
        (
            HELD_OUT | ROUNDS | STOP | {"rounds.eval_every": 4},
            "rounds.eval_every: got 4, but the run has 4 rounds, so only the last is evaluated, "
            "too late for guard.action='stop'; allowed: less than 4",
        ),
        (
            HELD_OUT | ROUNDS | {"guard.action": "retry", "rounds.eval_every": 5},
            "too late for guard.action='retry'",
        ),
        (
            HELD_OUT | ROUNDS | {"guard.patience": 5},
            "guard.patience: got 5, but the run has 4 rounds, of which 4 are evaluated, so no",
        ),
        (
            HELD_OUT | ROUNDS | {"guard.patience": 3, "rounds.eval_every": 2},
            "4 rounds, of which 2 are evaluated, so no bound would ever count as broken; allowed: "
            "at most 2",
        ),
        (
            ROUNDS | {"guard.patience": 5, "guard.max_kl": 1.0},
            "guard.patience: got 5, but the run has 4 rounds, so no bound would ever count",
        ),
    ],
)
def test_a_bound_that_can_never_do_anything_is_refused(changes, expected):
    (line,) = check(changes)
    assert expected in line


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guard.max_kl": 10.0, "rounds.watch_samples": 1},
        {"rounds.watch_samples": 0},
        {"guard.min_margin": 0.0, "rounds.watch_samples": 0},  # known from the loss's own pass
        HELD_OUT | ROUNDS | STOP | {"rounds.eval_every": 3},
        HELD_OUT | ROUNDS | {"rounds.eval_every": 4},  # a warning comes in time at the end
        HELD_OUT | ROUNDS | STOP | {"rounds.eval_every": 4, "guard.max_truncated": 0.5},
        ROUNDS | STOP | {"rounds.eval_every": 4},  # nothing is held out: the guard is off
        HELD_OUT | STOP | {"rounds.total_prompts": 8, "rounds.prompts_per_round": 8},
        HELD_OUT | ROUNDS | {"guard.patience": 4},
        HELD_OUT | ROUNDS | {"guard.patience": 2, "rounds.eval_every": 3},
        ROUNDS | {"guard.patience": 5},
        HELD_OUT | {"guard.patience": 99, "rounds.prompts_per_round": "auto"},
    ],
)
def test_what_may_be_broken_is_allowed(changes):
    assert check(changes) == []


def test_a_run_that_has_fewer_prompts_than_it_may_use_is_warned(caplog):
    rounds = RoundsConfig(total_prompts=80, prompts_per_round=8)
    config = Config(rounds=rounds, guard=GuardConfig(max_kl=1.0, patience=3))
    warn_of_idle(config, 3)
    assert not caplog.records
    warn_of_idle(config, 2)
    assert "guard.patience: got 3, but the run has 2 rounds, so no bound" in caplog.text
