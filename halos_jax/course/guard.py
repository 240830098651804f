"""The guard: which bounds the last rounds have broken, and what the run does about it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from halos_jax.config import GuardConfig
from halos_jax.course.best import REWARD, RoundRecord, find_highest, read_number
from halos_jax.course.falls import compare_means
from halos_jax.course.verdicts import CHANGE, DECISION, NO_VERDICT, Broken, Verdict, read_verdict
from halos_jax.signs.intervals import Estimate

# Bound -> the metrics that it looks at; the first one that a round has counts.
METRICS: Mapping[str, tuple[str, ...]] = {
    "guard.max_kl": ("kl_sft", "kl_sampled"),
    "guard.min_margin": ("fresh_margin",),
}
# What a bound sees in a round: (value, limit or interval, whether it is broken).
_Measured = tuple[float, float | tuple[float, float], bool]
_Read = Callable[[RoundRecord], float | None]
_Measure = Callable[[RoundRecord], _Measured | None]


def is_on(settings: GuardConfig, *, is_evaluated: bool) -> bool:
    """Tell whether there is any bound that a round could break."""
    bounds = (
        settings.max_kl,
        settings.min_margin != "off",
        settings.max_truncated < 1,
        settings.max_length_change,
        settings.scorer,
        settings.fall and is_evaluated,
    )
    return any(bounds)


def judge(settings: GuardConfig, done: Sequence[RoundRecord], *, best: int) -> Verdict:
    """Return the verdict at the end of the last of the rounds `done`.

    A bound is broken if each of the last `patience` rounds for which its metric is known breaks
    it, and the last round is one of them. Round 0 does not count, nor do rounds up to the last
    one after which the run went back.

    Args:
      done: all rounds from round 0 on. The last one's decision must have its `reward_change`, if
        that is known.
      best: the round to go back to; see `find_return`.
    """
    retries = [one.round for one in done if read_verdict(one).action == "retry"]
    counted = [one for one in done if one.round > max(retries, default=0)]
    broken = tuple(
        found
        for bound, measure in _list_bounds(settings, done).items()
        if (found := _find_broken(bound, measure, counted, settings.patience)) is not None
    )
    if not broken:
        return NO_VERDICT
    if settings.action != "retry":
        return Verdict(settings.action, broken)
    if len(retries) >= settings.max_retries:
        return Verdict("stop", broken, retries=len(retries))
    return Verdict("retry", broken, best, settings.rate_factor, len(retries))


def find_return(
    settings: GuardConfig, done: Sequence[RoundRecord], *, is_kept: Callable[[int], bool]
) -> int:
    """Return the round to go back to: the best one whose policy is within the bounds.

    Round 0, the SFT policy, may always be gone back to.

    Args:
      done: all rounds from round 0 on.
      is_kept: tells whether the policy of a round may still be had.
    """
    beyond = find_beyond(settings, done)
    within = [
        one for one in done if not one.round or (one.round not in beyond and is_kept(one.round))
    ]
    highest, _ = find_highest(within, REWARD)
    return highest.round if highest else 0


def find_beyond(
    settings: GuardConfig, done: Sequence[RoundRecord]
) -> dict[int, tuple[Broken, ...]]:
    """Map each round whose policy is beyond a bound, as far as is known, to what it breaks.

    The samples of a round tell of the policy that the round began with, so a policy is measured by
    the rounds that began with it. A policy with which no measured round began is taken to be beyond
    the bounds that its own round's samples break: it was trained further from that policy. A scorer
    is read on the policy itself. Round 0 is never beyond, and a fall of the reward does not count.
    """
    bounds = _list_bounds(settings, done)
    bounds.pop("guard.fall", None)
    beyond: dict[int, tuple[Broken, ...]] = {}
    for one in done:
        begun = _list_begun_with(one.round, done)
        broken = (
            _find_first_broken(bound, measure, [] if bound == "guard.scorer" else begun, one)
            for bound, measure in bounds.items()
        )
        found = tuple(each for each in broken if each is not None)
        if one.round and found:
            beyond[one.round] = found
    return beyond


def _list_begun_with(round: int, done: Sequence[RoundRecord]) -> list[RoundRecord]:
    """List the rounds that began with the policy of `round`."""
    sent = {one.round + 1: read_verdict(one) for one in done}
    starts = {
        to: verdict.to if verdict.action == "retry" and verdict.to is not None else to - 1
        for to, verdict in sent.items()
    }
    return [one for one in done if starts.get(one.round, one.round - 1) == round]


def _find_first_broken(
    bound: str, measure: _Measure, begun: Iterable[RoundRecord], own: RoundRecord
) -> Broken | None:
    """Return a bound that one of the rounds breaks; `own` counts if the others know nothing."""
    measured = [found for one in begun if (found := _find_value(bound, measure, one)) is not None]
    if not measured and (found := _find_value(bound, measure, own)) is not None:
        measured = [found]
    return next((each for each, is_broken in measured if is_broken), None)


def _find_value(bound: str, measure: _Measure, one: RoundRecord) -> tuple[Broken, bool] | None:
    found = measure(one)
    return None if found is None else (_make_broken(bound, [(one.round, found)]), found[2])


def _list_bounds(settings: GuardConfig, done: Sequence[RoundRecord]) -> dict[str, _Measure]:
    """Map each bound that is set to a function that measures a round; None: nothing is known."""
    bounds: dict[str, _Measure] = {}
    if settings.max_kl:
        bounds["guard.max_kl"] = _at_most(settings.max_kl, _read_first("guard.max_kl"))
    if settings.min_margin != "off":
        bounds["guard.min_margin"] = _at_least(settings.min_margin, _read_first("guard.min_margin"))
    if settings.max_truncated < 1:
        bounds["guard.max_truncated"] = _at_most(settings.max_truncated, _read_truncated)
    if settings.max_length_change:
        bounds["guard.max_length_change"] = _at_most(
            settings.max_length_change, lambda one: _read_length_change(one, done), size=abs
        )
    if settings.scorer:
        bounds["guard.scorer"] = lambda one: _measure_scorer(one, done, settings.scorer)
    if settings.fall:
        bounds["guard.fall"] = _measure_fall
    return bounds


def _at_most(
    limit: float, read: _Read, size: Callable[[float], float] = lambda value: value
) -> _Measure:
    def measure(record: RoundRecord) -> _Measured | None:
        value = read(record)
        return None if value is None else (value, float(limit), size(value) > limit)

    return measure


def _at_least(limit: float, read: _Read) -> _Measure:
    def measure(record: RoundRecord) -> _Measured | None:
        value = read(record)
        return None if value is None else (value, float(limit), value < limit)

    return measure


def _read_first(bound: str) -> _Read:
    def read(record: RoundRecord) -> float | None:
        values = (read_number(record, metric) for metric in METRICS[bound])
        return next((value for value in values if value is not None), None)

    return read


def _read_truncated(record: RoundRecord) -> float | None:
    """Return the share of a round's samples that were cut."""
    cut, samples = (read_number(record, name) for name in ("truncated", "samples"))
    return cut / samples if cut is not None and samples else None


def _read_length_change(record: RoundRecord, done: Sequence[RoundRecord]) -> float | None:
    """Return by what fraction the samples are longer than those of round 1, the SFT policy's."""
    name = "response_tokens_mean"
    lengths = (read_number(one, name) for one in done if one.round)
    first, now = next((one for one in lengths if one), None), read_number(record, name)
    return None if first is None or now is None else now / first - 1


def _measure_scorer(
    record: RoundRecord, done: Sequence[RoundRecord], scorer: str
) -> _Measured | None:
    """Compare the scorer's mean with its highest one before."""
    metric = f"{REWARD}/{scorer}"
    highest, count = find_highest([one for one in done if one.round < record.round], metric)
    now, best = _read_estimate(record, metric), _read_estimate(highest, metric)
    if now is None or best is None:
        return None
    change = compare_means(now, best, chosen_from=count)
    return change.value, (change.low, change.high), change.high < 0


def _read_estimate(record: RoundRecord | None, metric: str) -> Estimate | None:
    if record is None:
        return None
    value, low, high = (read_number(record, metric + end) for end in ("", "/low", "/high"))
    return None if value is None or low is None or high is None else Estimate(value, low, high)


def _measure_fall(record: RoundRecord) -> _Measured | None:
    change = record.decisions.get(DECISION, {}).get(CHANGE)
    if change is None:
        return None
    return change["value"], (change["low"], change["high"]), change["high"] < 0


def _find_broken(
    bound: str, measure: _Measure, counted: Sequence[RoundRecord], patience: int
) -> Broken | None:
    """Return a bound with the last `patience` rounds if all of them break it."""
    known = [(one.round, measure(one)) for one in counted]
    last = [(round, found) for round, found in known if found is not None][-patience:]
    if len(last) < patience or last[-1][0] != counted[-1].round:
        return None
    if not all(is_broken for _, (_, _, is_broken) in last):
        return None
    return _make_broken(bound, last)


def _make_broken(bound: str, measured: Sequence[tuple[int, _Measured]]) -> Broken:
    rounds = tuple(round for round, _ in measured)
    values = tuple(value for _, (value, _, _) in measured)
    limits = [limit for _, (_, limit, _) in measured]
    intervals = tuple(one for one in limits if isinstance(one, tuple))
    numbers = [one for one in limits if isinstance(one, float)]
    return Broken(bound, rounds, values, numbers[0] if numbers else None, intervals)
