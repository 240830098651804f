"""The charts of an online run with a point for each round, from the manifests."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.course.best import read_best, read_number
from halos_jax.course.verdicts import read_verdict
from halos_jax.report.charts import Chart, Line, Style
from halos_jax.report.recorded import Recorded
from halos_jax.workdir.manifests import Manifest


def first_known(rounds: Sequence[Manifest], *names: str) -> str:
    """Return the first of these metrics that any round has; the first one if none has."""
    known = {name for one in rounds for name in one.metrics}
    return next((name for name in names if name in known), names[0])


def follow(
    rounds: Sequence[Manifest], metric: str, name: str, *, shift: int = 0, style: Style = "line"
) -> Line:
    """Return the line of a metric over the rounds.

    Args:
      shift: what is added to the number of a round: -1 where the metric is of the policy that the
        round began with, which is that of the end of the round before.
    """
    points = [
        (one.round + shift, value, *_read_ends(one, metric))
        for one in rounds
        if (value := read_number(one, metric)) is not None
    ]
    if not points:
        return Line(name, (), (), style=style)
    x, y, low, high = (tuple(column) for column in zip(*points, strict=True))
    has_ends = any(end is not None for end in low)
    return Line(name, x, y, low if has_ends else (), high if has_ends else (), style=style)


def _read_ends(one: Manifest, metric: str) -> tuple[float | None, float | None]:
    return read_number(one, f"{metric}/low"), read_number(one, f"{metric}/high")


def list_scorers(rounds: Sequence[Manifest]) -> list[str]:
    """Return the names of the parts and scorers that held-out samples have been scored by."""
    prefix, found = "reward_eval/", dict[str, None]()
    for one in rounds:
        for name in one.metrics:
            rest = name.removeprefix(prefix)
            if name.startswith(prefix) and rest.rpartition("/")[2] not in ("low", "high"):
                found[rest] = None
    return list(found)


def draw_rounds(run: Recorded) -> list[Chart]:
    """Return the charts with a point for each round."""
    charts = [*_draw_held_out(run.rounds), *_draw_drift(run), *_draw_samples(run.rounds)]
    marks = tuple(list_marks(run.rounds))
    return [dataclasses.replace(one, marks=marks if one.x == "round" else ()) for one in charts]


def list_marks(rounds: Sequence[Manifest]) -> list[tuple[float, str]]:
    """Return (round, words) for the best round, and for those after which the run went back."""
    best = read_best(rounds[-1]) if rounds else None
    words: dict[int, list[str]] = {}
    if best is not None and 0 < best.round < rounds[-1].round:
        words[best.round] = ["best"]
    for one in rounds:
        verdict = read_verdict(one)
        if verdict.action == "retry":
            words.setdefault(one.round, []).append(f"back to {verdict.to or 'SFT'}")
    return [(round, ", ".join(words[round])) for round in sorted(words)]


def _draw_held_out(rounds: Sequence[Manifest]) -> list[Chart]:
    trained, scorers = [one for one in rounds if one.round], list_scorers(rounds)
    return [
        Chart(
            "reward",
            "Reward",
            "Held-out: mean over prompts that are never trained on, with its 95 % interval. "
            "Round 0 is the SFT policy.",
            "round",
            "reward",
            (
                follow(rounds, "reward_eval", "held-out"),
                follow(trained, "reward_train_mean", "training samples", shift=-1, style="faint"),
                follow(rounds, "reward_test", "test"),
            ),
        ),
        Chart(
            "win_rate",
            "Win rate against the SFT policy",
            "Share of held-out samples with a higher reward than the SFT policy's for the same "
            "prompt; equal ones count half.",
            "round",
            "share",
            (
                follow(rounds, "win_rate_eval", "by the reward"),
                *(follow(rounds, f"win_rate_eval/{one}", f"by {one}") for one in scorers),
            ),
            ((0.5, "no better"),),
        ),
        Chart(
            "scorers",
            "Held-out reward by parts and other scorers",
            "A scorer that falls while the reward rises says that the reward is being gamed.",
            "round",
            "score",
            tuple(follow(rounds, f"reward_eval/{one}", one) for one in scorers),
        ),
    ]


def _draw_drift(run: Recorded) -> list[Chart]:
    rounds, trained = run.rounds, [one for one in run.rounds if one.round]
    kl = first_known(rounds, "kl_sft", "kl_sampled")
    stale = first_known(rounds, "kl_stale", "kl_sampled_stale")
    return [
        Chart(
            "kl",
            "KL from the SFT policy",
            "How far the policy has moved, measured on the samples of the round after; within the "
            "round: by its own training alone.",
            "round",
            "nats a response",
            (
                follow(trained, kl, "from SFT", shift=-1),
                follow(trained, stale, "within the round", style="faint"),
            ),
            _bound(run, "max_kl"),
        ),
        _draw_path(rounds, kl),
        Chart(
            "margin",
            "Margin of fresh pairs",
            "Implicit reward of the better response less that of the worse one, on new pairs before"
            " they are learnt. Below 0 the policy prefers worse answers more than SFT does.",
            "round",
            "implicit reward",
            (follow(trained, "fresh_margin", "margin"),),
            ((0.0, "as SFT"), *_bound(run, "min_margin")),
        ),
        Chart(
            "accuracy",
            "Accuracy on fresh pairs",
            "How often the implicit reward orders responses as the reward does, before learning "
            "from them. Noise where the policy still is its reference, as in round 1.",
            "round",
            "share",
            (
                follow(trained, "fresh_accuracy", "the round's pairs"),
                follow(trained, "implicit_accuracy", "all pairs", style="faint"),
            ),
            ((0.5, "chance"),),
        ),
    ]


def _draw_samples(rounds: Sequence[Manifest]) -> list[Chart]:
    trained = [one for one in rounds if one.round]
    return [
        Chart(
            "length",
            "Response length",
            "If only the length rises with the reward, the reward may favour long answers.",
            "round",
            "tokens",
            (
                follow(rounds, "response_tokens_eval", "held-out"),
                follow(trained, "response_tokens_mean", "training", shift=-1, style="faint"),
            ),
        ),
        Chart(
            "shares",
            "Cut, tied, repeated",
            "Samples cut by the token limit, prompts whose samples all have the same reward (they "
            "teach nothing), repeated sequences of four tokens.",
            "round",
            "share",
            (
                follow(trained, "truncated_share", "cut", shift=-1),
                follow(trained, "tied_share", "tied", shift=-1),
                follow(trained, "repeated_4grams", "repeated", shift=-1),
            ),
        ),
        Chart(
            "entropy",
            "Entropy",
            "Mean entropy of the next token: a fall to near 0 says that samples are all alike.",
            "round",
            "nats a token",
            (follow(trained, "entropy", "entropy", shift=-1),),
        ),
        Chart(
            "spread",
            "Best and worst of a prompt's samples",
            "Learning needs a gap between them. Of the training samples.",
            "round",
            "reward",
            (
                follow(trained, "reward_best", "best", shift=-1),
                follow(trained, "reward_train_mean", "mean", shift=-1),
                follow(trained, "reward_worst", "worst", shift=-1),
            ),
        ),
    ]


def begins_with(one: Manifest) -> int:
    """Return the round whose policy sampled a round: 0 is SFT; the guard may have gone back."""
    name = one.policy.removeprefix("round-")
    return int(name) if name.isdigit() else 0


def _draw_path(rounds: Sequence[Manifest], kl: str) -> Chart:
    """Return held-out reward against KL: both of the policy at the end of the same round."""
    moved: dict[int, float] = {}
    for one in rounds:
        value = read_number(one, kl)
        if one.round and value is not None:
            moved.setdefault(begins_with(one), value)
    points = [
        (moved[one.round], reward, *_read_ends(one, "reward_eval"), f"round {one.round}")
        for one in rounds
        if one.round in moved and (reward := read_number(one, "reward_eval")) is not None
    ]
    x, y, low, high, notes = zip(*points, strict=True) if points else ((), (), (), (), ())
    line = Line("held-out", x, y, low, high, notes, "path")
    return Chart(
        "frontier",
        "Reward against KL",
        "What each nat of KL has bought. A path that goes right without going up drifts. The last "
        "round's KL is known once the next one has sampled.",
        "KL, nats a response",
        "reward",
        (line,),
    )


def _bound(run: Recorded, field: str) -> tuple[tuple[float, str], ...]:
    """Return the level of a bound of the guard, if it is set."""
    value = run.plain.get("guard", {}).get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or (field, value) in _OFF:
        return ()
    return ((float(value), f"guard.{field}"),)


_OFF = {("max_kl", 0.0)}


def draw_times(times: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the time of each stage, a bar a round."""
    spans: dict[str, dict[int, float]] = {}
    for one in times:
        spans.setdefault(str(one["stage"]), {})[int(one["round"])] = one["end"] - one["start"]
    longest = max((sum(row.values()) for row in spans.values()), default=0.0)
    unit, by = ("minutes", 60.0) if longest > 600 else ("seconds", 1.0)
    lines = tuple(
        Line(
            stage,
            tuple(sorted(row)),
            tuple(row[round] / by for round in sorted(row)),
            style="bar",
        )
        for stage, row in spans.items()
    )
    about = "Round 0 evaluates the SFT policy; the first round compiles."
    return Chart("times", "Time per stage", about, "round", unit, lines)
