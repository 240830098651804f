"""A verdict of the guard: what a manifest and the log say of it.

A manifest's `decisions["guard"]` holds the verdict at the end of its round:

    {"action": "retry", "to": 4, "rate_factor": 0.5, "retries": 0,
     "broken": [{"bound": "guard.max_kl", "limit": 10.0, "rounds": [6], "values": [12.5]}],
     "reward_change": {"than": 4, "value": -0.05, "low": -0.08, "high": -0.02}}
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from halos_jax.course.best import RoundRecord
from halos_jax.signs.intervals import Estimate

DECISION = "guard"
CHANGE = "reward_change"  # in the decision: see `make_change`
Action = Literal["none", "warn", "stop", "retry"]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A bound that `rounds` have broken, in a row; `values` are what it looked at.

    `limit` is None where a value is a change, which breaks the bound if all of its interval, in
    `intervals`, is below 0.
    """

    bound: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]
    limit: float | None = None
    intervals: tuple[tuple[float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is done at the end of a round.

    Attributes:
      action: "none" if no bound is broken. "stop" also if the run has gone back too often.
      to: for "retry", the round whose policy the next round starts from.
      rate_factor: for "retry", what the learning rate is multiplied by from there on.
      retries: how often the run had gone back before.
    """

    action: Action
    broken: tuple[Broken, ...] = ()
    to: int | None = None
    rate_factor: float | None = None
    retries: int = 0

    @property
    def is_final(self) -> bool:
        """Whether the next round does not simply go on from this one."""
        return self.action in ("stop", "retry")

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object that a manifest holds, without what is not set."""
        plain = dataclasses.asdict(self)
        plain["broken"] = [_drop_unset(one) for one in plain["broken"]]
        made: dict[str, Any] = json.loads(json.dumps(_drop_unset(plain)))
        return made


NO_VERDICT = Verdict("none")


def read_verdict(record: RoundRecord | None) -> Verdict:
    """Return the verdict in a round's manifest; `NO_VERDICT` if there is none."""
    found = {} if record is None else dict(record.decisions.get(DECISION, {}))
    if "action" not in found:
        return NO_VERDICT
    found.pop(CHANGE, None)
    return Verdict(**{**found, "broken": tuple(map(_read_broken, found.get("broken", ())))})


def make_change(than: int, change: Estimate) -> dict[str, Any]:
    """Return the JSON object for the change of the held-out reward against that of round `than`."""
    return {"than": than, **change._asdict()}


def scale_rate(done: Sequence[RoundRecord | None]) -> float:
    """Return what the learning rate is multiplied by after the rounds `done`."""
    factor = 1.0
    for record in done:
        factor *= read_verdict(record).rate_factor or 1.0
    return factor


# Bound -> what it looks at, and what a user can change.
_WORDS: Mapping[str, tuple[str, str]] = {
    "guard.max_kl": (
        "KL from the SFT model, nats a response",
        "lower optimizer.learning_rate or raise the loss's beta",
    ),
    "guard.min_margin": (
        "margin of the implicit rewards on new pairs",
        "lower optimizer.learning_rate, or use smaller rounds (rounds.prompts_per_round)",
    ),
    "guard.max_truncated": (
        "share of truncated samples",
        "raise sampling.max_tokens, or give truncated samples a lower reward",
    ),
    "guard.max_length_change": (
        "change of the mean length since round 1, as a fraction of it",
        "look at what the reward says of long answers, or lower optimizer.learning_rate",
    ),
    "guard.scorer": (
        "change of the scorer's held-out mean against its highest",
        "the reward may be wrong where the scorer is right; lower optimizer.learning_rate",
    ),
    "guard.fall": (
        "change of the held-out reward against its highest",
        "lower optimizer.learning_rate, or use smaller rounds (rounds.prompts_per_round)",
    ),
}


def describe_verdict(verdict: Verdict, round: int, *, is_last: bool = False) -> str:
    """Return the warning for a round whose verdict is not "none".

    Args:
      is_last: whether the budget is used up, so that no round follows.
    """
    parts = [_describe_broken(one) for one in verdict.broken]
    advice = dict.fromkeys(_WORDS[one.bound][1] for one in verdict.broken)
    return (
        f"round {round} is beyond {' and '.join(parts)}; {_describe_action(verdict, is_last)}; "
        f"to change: {'; '.join(advice)}; or change the bound"
    )


def describe_stop(verdict: Verdict, round: int, *, is_last: bool = False) -> str:
    """Return why a run has ended after `round`, and how it can go on.

    Args:
      is_last: whether the budget is used up, too.
    """
    parts = [_describe_broken(one) for one in verdict.broken]
    tried = f" and {verdict.retries} retries (guard.max_retries)" if verdict.retries else ""
    more = ", raise rounds.total_prompts (it is used up)" if is_last else ""
    return (
        f"the guard has ended the run after round {round}: {' and '.join(parts)}{tried}; to go "
        f"on, change the bound or set --config.guard.action=warn{more}, and run the same command "
        "again"
    )


def describe_beyond(round: int, broken: Sequence[Broken]) -> str:
    """Return the warning that the policy of `round`, which is exported, is beyond a bound."""
    parts = " and ".join(_describe_broken(one) for one in broken)
    return (
        f"final/ holds the policy of round {round}, which is beyond {parts}, as far as is known; "
        "an earlier round may be within it: see the metrics of the rounds"
    )


def _describe_broken(broken: Broken) -> str:
    what = _WORDS[broken.bound][0]
    values = [f"{value:.4g}" for value in broken.values]
    if broken.intervals:
        pairs = zip(values, broken.intervals, strict=True)
        values = [f"{value} [{low:.4g}, {high:.4g}]" for value, (low, high) in pairs]
    limit = "" if broken.limit is None else f"={broken.limit:.4g}"
    rounds = "" if len(values) == 1 else f" in rounds {', '.join(map(str, broken.rounds))}"
    return f"{broken.bound}{limit} ({what}: {', '.join(values)}{rounds})"


def _describe_action(verdict: Verdict, is_last: bool) -> str:
    if is_last and verdict.action == "warn":
        return "it was the last round (guard.action=warn)"
    if verdict.action == "retry":
        start = (
            f"round {verdict.to}, the best within the bounds so far,"
            if verdict.to
            else "the SFT model"
        )
        next_round = "the next round"
        if is_last:
            next_round = "it was the last round; a further one, with more prompts,"
        return (
            f"{next_round} starts from {start} with the learning rate times "
            f"{verdict.rate_factor} (guard.action=retry)"
        )
    if verdict.action == "stop":
        return "the run ends here" + (
            f": it has gone back {verdict.retries} times (guard.max_retries)"
            if verdict.retries
            else " (guard.action=stop)"
        )
    return "it goes on (guard.action=warn)"


def _read_broken(plain: Mapping[str, Any]) -> Broken:
    lists = {name: tuple(plain[name]) for name in ("rounds", "values")}
    intervals = tuple((low, high) for low, high in plain.get("intervals", ()))
    return Broken(plain["bound"], limit=plain.get("limit"), intervals=intervals, **lists)


def _drop_unset(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what is None or empty."""
    return {name: value for name, value in plain.items() if value not in (None, (), [])}
