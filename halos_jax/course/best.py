"""The best round of a run: the one whose policy got the highest held-out reward.

A manifest's `decisions["best"]` says which it is, up to that round:

    {"round": 9, "reward": 0.247, "of": 12}    the best of 12 rounds whose policy may still be had
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DECISION = "best"
REWARD = "reward_eval"


class RoundRecord(Protocol):
    """What is read of a round's manifest."""

    @property
    def round(self) -> int: ...

    @property
    def metrics(self) -> Mapping[str, Any]: ...

    @property
    def decisions(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Best:
    """The best round so far.

    Attributes:
      round: the round; 0, the SFT policy, as long as no reward is known.
      reward: its mean held-out reward; None if no reward is known.
      of: from how many evaluated rounds it was chosen.
    """

    round: int
    reward: float | None
    of: int

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object that a manifest holds."""
        return dataclasses.asdict(self)


def read_best(record: RoundRecord | None) -> Best | None:
    """Return the best round up to a round, as its manifest says; None if it says nothing."""
    found = None if record is None else record.decisions.get(DECISION)
    return None if found is None else Best(**found)


def choose_best(done: Sequence[RoundRecord], *, begin: bool) -> Best | None:
    """Return the best of the rounds `done`, whose last one has just ended; None: none is kept.

    It is the best one of the round before, or the last round if its reward is higher; so of equal
    rounds the earliest. A round that was not evaluated changes nothing.

    Args:
      done: all rounds from round 0 on.
      begin: whether to begin with the SFT policy and the last round if the rounds before name no
        best one: their checkpoints were not kept. If not, then none is named from here on.
    """
    last = done[-1]
    before = read_best(done[-2]) if len(done) > 1 else None
    if before is None:
        if last.round and not begin:
            return None
        before = _add(Best(0, None, 0), done[0])
    return _add(before, last) if last.round else before


def find_highest(done: Sequence[RoundRecord], metric: str) -> tuple[RoundRecord | None, int]:
    """Return the earliest round with the highest value of a metric, and how many rounds have one.

    Rounds without a finite value do not count.
    """
    known = [one for one in done if read_number(one, metric) is not None]
    highest = max(known, key=lambda one: float(one.metrics[metric]), default=None)
    return highest, len(known)


def read_number(record: RoundRecord, metric: str) -> float | None:
    """Return a round's metric as a finite number, or None."""
    value = record.metrics.get(metric)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _add(best: Best, record: RoundRecord) -> Best:
    reward = read_number(record, REWARD)
    if reward is None:
        return best
    if best.reward is None or reward > best.reward:
        return Best(record.round, reward, best.of + 1)
    return dataclasses.replace(best, of=best.of + 1)
