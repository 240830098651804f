"""Where the states of rounds come from."""

from types import SimpleNamespace

import pytest

from halos_jax.audit.rederive import policies
from halos_jax.audit.rederive.policies import Policies
from halos_jax.packing.layout import LayoutMemory


class Replica:
    """Has the state of the SFT checkpoint, and those of `kept` rounds."""

    scratch = "scratch"

    def __init__(self, kept):
        self.kept = kept

    def at(self, round):
        return SimpleNamespace(round=round, trainer=SimpleNamespace(layouts=LayoutMemory()))

    def load_begin(self, run, round):
        start = policies.find_start(self.scratch, round)
        return f"state {start}" if start in (0, *self.kept) else None

    def load_end(self, run, round):
        return f"state {round}" if round in self.kept else None

    def count_steps(self, round):
        return 10 * round


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Let each round begin with the one before, round 5 with round 1."""
    starts = {5: 1}
    monkeypatch.setattr(policies, "find_start", lambda scratch, round: starts.get(round, round - 1))
    monkeypatch.setattr(policies, "set_step", lambda state, step: f"{state} at {step}")


def make(kept=(), *, replays=True):
    trained = []

    def train(run, state, round):
        trained.append((run.round, state, round))
        return f"state {round}"

    replica = Replica(kept)
    return Policies(replica, replays, train), replica, trained


def test_a_deleted_state_is_trained_again_from_the_last_that_is_there():
    found, replica, trained = make(kept=[1])
    assert found.begin(replica.at(4), 4) == "state 3"
    assert trained == [(2, "state 1", 2), (3, "state 2", 3)]
    assert found.replayed == [2, 3]


def test_without_replay_it_is_gone():
    found, replica, trained = make(kept=[1], replays=False)
    assert found.begin(replica.at(2), 2) == "state 1"
    assert found.begin(replica.at(4), 4) is None
    assert (found.end(replica.at(1), 1), found.end(replica.at(3), 3)) == ("state 1", None)
    assert trained == []


def test_a_state_that_was_reached_is_used_before_any_is_trained_again():
    found, replica, trained = make()
    found.hold(replica.at(3), 3, "reached 3")
    assert found.end(replica.at(3), 3) == "reached 3"
    assert found.begin(replica.at(4), 4, keep=True) == "reached 3"
    assert found.begin(replica.at(4), 4) == "reached 3"
    assert trained == []


def test_a_round_that_went_back_counts_its_steps_on():
    found, replica, trained = make()
    assert found.begin(replica.at(5), 5) == "state 1 at 40"
    assert trained == [(1, "state 0", 1)]
