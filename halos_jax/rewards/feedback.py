"""Feedback from scored samples: pairs of a prompt's samples, labels, or the rewards themselves."""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from halos_jax.config import Config
from halos_jax.data.records import formats
from halos_jax.data.records.formats import digest
from halos_jax.types import FINISH_LENGTH, Completion, Judgement, Preference, Sample, Turn

Mode = Literal["random", "max", "min", "all"]
_Pair = tuple[Sample, Sample]  # the better one first

# Differences of rewards count as equal if rounding alone could make them differ by this much.
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True, slots=True)
class FeedbackResult:
    """Preferences, and counts of what became of the samples.

    `counts` has: prompts; pairs (preferences made); ties (pairs dropped because their rewards are
    too close; in mode "min", prompts without a pair that is far enough apart); single (prompts with
    fewer than two rewards); unlabelled (samples without a reward, left out); truncated (samples
    cut by the token limit); and with a largest length gap, length_gap (pairs that it alone rules
    out, some of which another pair replaces).
    """

    preferences: list[Preference]
    counts: dict[str, int]


def make_preferences(
    samples: Sequence[Sample],
    *,
    mode: Mode,
    threshold: float,
    seed: int,
    round: int,
    max_length_gap: float = 0.0,
) -> FeedbackResult:
    """Make preferences from the samples of each prompt, in order of the prompts' first samples.

    Modes: "random" shuffles a prompt's samples and takes disjoint neighbours; "max" takes the best
    and the worst (the lowest sample id of equal best, the highest of equal worst); "min" takes the
    closest pair whose rewards differ by at least `threshold`, and every other pair that is as
    close; "all" takes every pair. Except in mode "min", rewards must differ by more than
    `threshold`. Equal rewards never make a pair, since neither sample is better (HALOs keeps them
    in mode "min" at threshold 0, with an arbitrary label).

    With `max_length_gap`, the two responses of a pair may differ in length, in tokens, by at most
    this fraction of the longer one. Mode "max" then takes the pair within that gap whose rewards
    differ most, and "min" the closest ones within it; the others drop pairs that exceed it.
    The shuffle depends only on (seed, round, prompt id, sample ids).

    Raises:
      ValueError: for an unknown mode, a negative threshold, a reward that is not finite, a sample
        twice or of unknown length, or samples of one prompt whose prompt tokens differ.
    """
    if max_length_gap and (unknown := sum(not one.response_ids for one in samples if one.output)):
        raise ValueError(
            f"feedback.max_length_gap: got {max_length_gap:g}, but {unknown} of {len(samples)} "
            "samples have no response_ids, which give their lengths; allowed for text alone: 0"
        )
    if mode not in _PAIRINGS:
        raise ValueError(f"feedback.mode: got {mode!r}, allowed: {', '.join(map(repr, _PAIRINGS))}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"feedback.threshold: got {threshold}, allowed: a number of 0 or more")
    preferences: list[Preference] = []
    groups = _group_by_prompt(samples)
    ties = single = gap = 0
    for prompt_id, group in groups.items():
        scored = [sample for sample in group if sample.reward is not None]
        if len(scored) < 2:
            single += 1
            continue
        # By hash rather than by a generator's stream: no prompt's shuffle depends on another's.
        shuffled = sorted(
            scored, key=lambda s: digest("shuffle", seed, round, prompt_id, int(s.sample_id))
        )
        pairs, dropped, ruled_out = _choose_pairs(shuffled, mode, threshold, max_length_gap)
        ties, gap = ties + dropped, gap + ruled_out
        preferences += [_make_preference(better, worse) for better, worse in pairs]
    counts = {
        "prompts": len(groups),
        "pairs": len(preferences),
        "ties": ties,
        "single": single,
        **({"length_gap": gap} if max_length_gap else {}),
        **_count_samples(samples),
    }
    return FeedbackResult(preferences, counts)


def _choose_pairs(
    shuffled: list[Sample], mode: Mode, threshold: float, max_length_gap: float
) -> tuple[list[_Pair], int, int]:
    """Return a prompt's pairs, how many are ties, and how many the gap rules out."""

    def fits(pair: _Pair) -> bool:
        lengths = sorted(len(sample.response_ids) for sample in pair)
        return lengths[1] - lengths[0] <= max_length_gap * lengths[1]

    pairs, dropped = _PAIRINGS[mode](shuffled, threshold, lambda pair: True)
    if not max_length_gap:
        return pairs, dropped, 0
    within, _ = _PAIRINGS[mode](shuffled, threshold, fits)
    return within, dropped, len(set(map(_name, pairs)) - set(map(_name, within)))


def weigh_by_margin(preferences: Sequence[Preference], most: float) -> list[Preference]:
    """Return the preferences with weights of mean 1 in proportion to the margins of their rewards.

    Before they are scaled to that mean, weights are cut at `most` times the mean margin.
    """
    margins = [(one.chosen.reward or 0.0) - (one.rejected.reward or 0.0) for one in preferences]
    if not margins:
        return []
    limit = most * statistics.fmean(margins)
    cut = [min(margin, limit) for margin in margins]
    mean = statistics.fmean(cut)
    return [
        dataclasses.replace(one, weight=margin / mean)
        for one, margin in zip(preferences, cut, strict=True)
    ]


def make_judgements(
    samples: Sequence[Sample],
    *,
    threshold: float | Literal["mean", "median"],
    scope: Literal["file", "prompt"] = "file",
) -> tuple[list[Judgement], dict[str, int]]:
    """Label the samples that have a reward: desirable where it is `threshold` or more.

    If the threshold is an average, several rewards may equal it. All of them get the same label,
    whichever makes the classes more even, and "desirable", as in HALOs, if both are as good. If all
    rewards that are averaged are equal, none is better: these samples get no label and count as
    ties (HALOs labels all of them desirable).

    Args:
      threshold: a number, or the mean or median of the rewards of the whole file or, where `scope`
        is "prompt", of the sample's own prompt.

    Returns:
      The judgements in the order of the samples' prompts, and counts: prompts; examples (labels
      made); desirable; ties (samples whose reward is as good as all others); unlabelled and
      truncated as in `FeedbackResult`.

    Raises:
      ValueError: for a threshold that is not allowed, and for samples as `make_preferences`.
    """
    if not (threshold in _AVERAGES or _is_number(threshold)):
        raise ValueError(
            f"feedback.threshold: got {threshold!r}, allowed: a finite number, 'mean', 'median'"
        )
    groups = _group_by_prompt(samples)
    scored = [[one for one in group if one.reward is not None] for group in groups.values()]
    everything = [_get_reward(one) for group in scored for one in group]
    judgements: list[Judgement] = []
    for group in scored:
        among = [_get_reward(one) for one in group] if scope == "prompt" else everything
        is_desirable = _make_test(threshold, among)
        if is_desirable is None:
            continue
        judgements += [
            Judgement(
                one.prompt,
                _make_completion(one),
                is_desirable(_get_reward(one)),
                tuple(one.prompt_ids),
            )
            for one in group
        ]
    counts = {
        "prompts": len(groups),
        "examples": len(judgements),
        "desirable": sum(judgement.desirable for judgement in judgements),
        "ties": len(everything) - len(judgements),
    }
    return judgements, counts | _count_samples(samples)


def _make_test(threshold: float | str, rewards: Sequence[float]) -> Callable[[float], bool] | None:
    """Return the test of whether a reward is desirable; None if the rewards do not differ."""
    if not isinstance(threshold, str):
        return _test_from(threshold)
    if len(set(rewards)) < 2:
        return None
    limit = _AVERAGES[threshold](rewards)
    least, above = sum(one >= limit for one in rewards), sum(one > limit for one in rewards)
    # Compare how far apart the class sizes are with rewards equal to the limit in either class.
    if abs(2 * above - len(rewards)) < abs(2 * least - len(rewards)):
        return lambda reward: reward > limit
    return _test_from(limit)


def _test_from(limit: float) -> Callable[[float], bool]:
    return lambda reward: reward >= limit


def make_groups(samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, int]]:
    """Return the samples that have a reward, grouped by prompt, and counts.

    The counts have: prompts; examples (prompts with at least one reward); single (those with only
    one reward, which has nothing to be compared with); equal (prompts with several rewards, all the
    same); unlabelled and truncated as in `FeedbackResult`.

    Raises:
      ValueError: as `make_preferences`.
    """
    groups = _group_by_prompt(samples)
    scored = [[one for one in group if one.reward is not None] for group in groups.values()]
    counts = {
        "prompts": len(groups),
        "examples": sum(bool(group) for group in scored),
        "single": sum(len(group) == 1 for group in scored),
        "equal": sum(
            len(group) > 1 and len({one.reward for one in group}) == 1 for group in scored
        ),
    }
    return list(itertools.chain.from_iterable(scored)), counts | _count_samples(samples)


_AVERAGES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
}


def _get_reward(sample: Sample) -> float:
    """Return the reward of a sample that has one."""
    if sample.reward is None:
        raise ValueError(f"sample {sample.sample_id} of {sample.prompt.prompt_id} has no reward")
    return sample.reward


def _is_number(value: float | str) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _count_samples(samples: Sequence[Sample]) -> dict[str, int]:
    return {
        "unlabelled": sum(sample.reward is None for sample in samples),
        "truncated": sum(sample.finish_reason == FINISH_LENGTH for sample in samples),
    }


# Each gets the samples of a prompt, the threshold, and the test of whether a pair may be made. It
# returns the pairs, and how many more there are whose rewards are too close.
_Fits = Callable[[_Pair], bool]
_Found = tuple[list[_Pair], int]


def _pair_neighbours(shuffled: list[Sample], threshold: float, fits: _Fits) -> _Found:
    halves = zip(shuffled[::2], shuffled[1::2], strict=False)
    pairs = [(better, worse) for better, worse in map(_rank, halves)]
    apart = [pair for pair in pairs if _difference(pair) > threshold + _EPSILON]
    return list(filter(fits, apart)), len(pairs) - len(apart)


def _pair_extremes(shuffled: list[Sample], threshold: float, fits: _Fits) -> _Found:
    ranked = _rank(shuffled)
    # From the outside in: of pairs that are as far apart, the first is taken.
    ends = [(i, j) for i in range(len(ranked)) for j in range(len(ranked) - 1, i, -1)]
    pairs = filter(fits, ((ranked[i], ranked[j]) for i, j in ends))
    pair = max(pairs, key=_difference, default=None)
    if pair is None:
        return [], 0
    return ([pair], 0) if _difference(pair) > threshold + _EPSILON else ([], 1)


def _pair_closest(shuffled: list[Sample], threshold: float, fits: _Fits) -> _Found:
    # Equal rewards are the closest of all but give no preference, even at threshold 0.
    pairs = [
        pair
        for pair in itertools.combinations(_rank(shuffled), 2)
        if _difference(pair) >= threshold - _EPSILON and _difference(pair) > _EPSILON
        if fits(pair)
    ]
    if not pairs:
        return [], 1
    closest = min(map(_difference, pairs))
    return [pair for pair in pairs if _difference(pair) <= closest + _EPSILON], 0


def _pair_all(shuffled: list[Sample], threshold: float, fits: _Fits) -> _Found:
    pairs = list(itertools.combinations(_rank(shuffled), 2))
    apart = [pair for pair in pairs if _difference(pair) > threshold + _EPSILON]
    return list(filter(fits, apart)), len(pairs) - len(apart)


_PAIRINGS = {
    "random": _pair_neighbours,
    "max": _pair_extremes,
    "min": _pair_closest,
    "all": _pair_all,
}


def _rank(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Sort from best to worst, equal rewards by sample id."""
    return tuple(sorted(samples, key=lambda sample: (-_get_reward(sample), sample.sample_id)))


def _name(pair: _Pair) -> tuple[int, int]:
    return pair[0].sample_id, pair[1].sample_id


def _difference(pair: _Pair) -> float:
    return _get_reward(pair[0]) - _get_reward(pair[1])


def _group_by_prompt(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = collections.defaultdict(list)
    seen: set[tuple[str, int]] = set()
    for sample in samples:
        name = f"sample {sample.sample_id} of prompt {sample.prompt.prompt_id}"
        if sample.reward is not None and not math.isfinite(sample.reward):
            raise ValueError(
                f"{name}: got reward {sample.reward}, allowed: a finite number or none"
            )
        if (sample.prompt.prompt_id, sample.sample_id) in seen:
            raise ValueError(
                f"{name}: got it twice, allowed: one sample for each prompt and sample id"
            )
        seen.add((sample.prompt.prompt_id, sample.sample_id))
        group = groups[sample.prompt.prompt_id]
        if group and group[0].prompt_ids != sample.prompt_ids:
            raise ValueError(
                f"{name}: got other prompt tokens than sample {group[0].sample_id}, allowed: "
                "samples of one prompt; were they rendered with another max_prompt_length?"
            )
        group.append(sample)
    return dict(groups)


def _make_preference(better: Sample, worse: Sample) -> Preference:
    return Preference(
        prompt=better.prompt,
        chosen=_make_completion(better),
        rejected=_make_completion(worse),
        prompt_ids=tuple(better.prompt_ids),
    )


def _make_completion(sample: Sample) -> Completion:
    return Completion(
        turns=(Turn("assistant", sample.output),),
        ids=tuple(sample.response_ids),
        reward=sample.reward,
        sample_id=sample.sample_id,
        finish_reason=sample.finish_reason,
        logps=sample.logps,
    )


# --------------------------------------------------------------------------- types of feedback

Rows = tuple[list[dict[str, Any]], dict[str, int]]  # records, and what was counted


def make_pairwise(config: Config, scored: Sequence[Sample], round: int) -> Rows:
    """Return the records of preferences."""
    settings, seed = config.feedback, config.seed
    # The only name that is allowed here is "auto".
    threshold = 0.0 if isinstance(settings.threshold, str) else settings.threshold
    result = make_preferences(
        scored,
        mode=settings.mode,
        threshold=threshold,
        seed=seed,
        round=round,
        max_length_gap=settings.max_length_gap,
    )
    pairs = result.preferences
    if settings.margin_weights:
        pairs = weigh_by_margin(pairs, settings.margin_weights)
    rows = [formats.preference_to_record(one, seed=seed, round=round) for one in pairs]
    return rows, result.counts


def make_binary(config: Config, scored: Sequence[Sample], round: int) -> Rows:
    """Return the records of answers that are desirable or not."""
    settings = config.feedback
    asked = settings.threshold
    threshold: float | Literal["mean", "median"] = "median" if asked == "auto" else asked
    judgements, counts = make_judgements(scored, threshold=threshold, scope=settings.scope)
    return [formats.judgement_to_record(one) for one in judgements], counts


def make_scalar(config: Config, scored: Sequence[Sample], round: int) -> Rows:
    """Return the records of samples with their rewards."""
    groups, counts = make_groups(scored)
    return [formats.sample_to_record(one, type="scalar_feedback") for one in groups], counts
