"""Samples of two policies side by side: paired by prompt, and compared score by score."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from halos_jax.data.records.fields import RecordError
from halos_jax.signs.fresh import group_samples
from halos_jax.signs.intervals import Estimate, estimate_mean
from halos_jax.signs.wins import estimate_wins
from halos_jax.types import Sample


class Pairing(NamedTuple):
    """Pairs of samples of the same prompt, and what has no partner.

    Attributes:
      pairs: (index of a sample in the first set, index in the second one).
      first_alone, second_alone: samples without a partner.
      first_prompts, second_prompts: prompts that are in one of the sets alone.
    """

    pairs: list[tuple[int, int]]
    first_alone: int = 0
    second_alone: int = 0
    first_prompts: int = 0
    second_prompts: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every sample has a partner."""
        return not (self.first_alone or self.second_alone)


def pair_samples(first: Sequence[Sample], second: Sequence[Sample]) -> Pairing:
    """Pair the k-th sample of each prompt with the k-th one of the same prompt in the other set.

    Samples of a prompt are taken in the order of their numbers. Where these are the same in both
    sets, sample i meets sample i. Pairs are in the order of the first set's prompts.

    Raises:
      RecordError: if a prompt id stands for two conversations.
    """
    groups = _group(first), _group(second)
    pairs: list[tuple[int, int]] = []
    for name, members in groups[0].items():
        others = groups[1].get(name, [])
        if others and first[members[0]].prompt.turns != second[others[0]].prompt.turns:
            places = [one.prompt.place for one in (first[members[0]], second[others[0]])]
            raise RecordError(
                f"{places[0] or 'the first samples'}: got prompt_id {name!r} for another "
                f"conversation than {places[1] or 'the second samples'}; allowed: the same ids for "
                "the same prompts; sample both from one file of prompts, or renumber one of them"
            )
        pairs += zip(members, others, strict=False)
    return Pairing(
        pairs,
        len(first) - len(pairs),
        len(second) - len(pairs),
        len(groups[0].keys() - groups[1].keys()),
        len(groups[1].keys() - groups[0].keys()),
    )


def _group(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the indices of each prompt's samples, by their numbers."""
    places = {id(one): index for index, one in enumerate(samples)}
    return {
        name: [places[id(one)] for one in sorted(group, key=lambda one: one.sample_id)]
        for name, group in group_samples(samples).items()
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of paired samples by one scorer.

    Attributes:
      wins, ties, losses: pairs in which the first sample has the higher, same or lower score.
      unscored: pairs in which a sample has no score; nothing else counts them.
      win_rate: share of pairs that the first one wins; a tie counts one half.
      first, second, gain: means of the scores, and of the first one's less the second one's.
    """

    wins: int
    ties: int
    losses: int
    unscored: int
    win_rate: Estimate | None
    first: Estimate | None
    second: Estimate | None
    gain: Estimate | None

    def to_record(self) -> dict[str, Any]:
        """Return it as JSON; ends of an interval that are not known are null."""
        plain = dataclasses.asdict(self)
        for name in ("win_rate", "first", "second", "gain"):
            plain[name] = _to_record(getattr(self, name))
        return plain


def compare_scores(
    scores: Sequence[float | None], others: Sequence[float | None], prompts: Sequence[str]
) -> Comparison:
    """Compare the scores of pairs; intervals count prompts.

    Args:
      scores, others: f64[n], of either sample of a pair; None where it has none.
      prompts: the prompt of each pair.
    """
    known = [
        (one, other, prompt)
        for one, other, prompt in zip(scores, others, prompts, strict=True)
        if one is not None and other is not None
    ]
    unscored = len(scores) - len(known)
    if not known:
        return Comparison(0, 0, 0, unscored, None, None, None, None)
    ones, twos, owners = (list(values) for values in zip(*known, strict=True))
    return Comparison(
        wins=sum(one > two for one, two in zip(ones, twos, strict=True)),
        ties=sum(one == two for one, two in zip(ones, twos, strict=True)),
        losses=sum(one < two for one, two in zip(ones, twos, strict=True)),
        unscored=unscored,
        win_rate=estimate_wins(ones, twos, owners),
        first=estimate_mean(ones, owners),
        second=estimate_mean(twos, owners),
        gain=estimate_mean([one - two for one, two in zip(ones, twos, strict=True)], owners),
    )


def _to_record(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    known = abs(estimate.low) != float("inf")
    ends = {"low": estimate.low if known else None, "high": estimate.high if known else None}
    return {"value": estimate.value, **ends}
