"""Samples drawn again: a shard of prompts is what is sampled whole, so shards are made again.

A sample depends on its keys, the policy and, to the last bit, on the shapes of its shard. So a few
samples cannot be made again by themselves: all samples of their shards are.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from halos_jax import sharding
from halos_jax.audit.findings import Finding, compare, differs, not_checked, passed
from halos_jax.audit.rederive.compare import compare_rows
from halos_jax.audit.rederive.same import explain_programs
from halos_jax.data.records import formats as records
from halos_jax.data.tokenize import make_group_items
from halos_jax.integers import divide_up
from halos_jax.policies.policy import Policy
from halos_jax.rounds import stages
from halos_jax.rounds.context import Rollouts
from halos_jax.rounds.proof import rescore
from halos_jax.sampling.sampler import render_prefix
from halos_jax.tasks.launch import compile_aside
from halos_jax.training import loop as training
from halos_jax.training.loop import Trainer
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Params, Prompt, Sample


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a run has drawn from one policy.

    Attributes:
      check: the name of the check, "samples" or "held-out samples".
      round: the round whose keys were used.
      prompts: in order; those of one extent of a round or of a held-out set.
      samples: of all the prompts, in order.
    """

    check: str
    round: int
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]

    @property
    def per_prompt(self) -> int:
        return len(self.samples) // max(len(self.prompts), 1)

    def take_shard(self, number: int, size: int) -> "Draws":
        """Return the part that was sampled as one shard of `size` prompts."""
        prompts = self.prompts[number * size : (number + 1) * size]
        count = self.per_prompt
        samples = self.samples[number * size * count : (number + 1) * size * count]
        return dataclasses.replace(self, prompts=prompts, samples=samples)


class Rescorer(Protocol):
    """The part of a run that re-scores answers by a forward pass."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def policy(self) -> Policy: ...


def choose_shards(
    drawn: Sequence[Draws], size: int, wanted: int, seed: int
) -> list[tuple[int, int]]:
    """Return (index of a part, number of a shard in it) of as many as have `wanted` samples.

    Args:
      wanted: samples to make again; -1: all.
      seed: of the random choice.
    """
    places = [
        (index, number)
        for index, part in enumerate(drawn)
        for number in range(divide_up(len(part.prompts), size))
    ]
    if wanted < 0:
        return places
    random.Random(seed).shuffle(places)
    chosen, taken = list[tuple[int, int]](), 0
    for index, number in places:
        if taken >= wanted:
            break
        chosen.append((index, number))
        taken += len(drawn[index].take_shard(number, size).samples)
    return sorted(chosen)


def check_prompts(run: Rollouts, drawn: Sequence[Draws]) -> Finding:
    """Compare what a sample says of its prompt, text and end with what its tokens say.

    No policy is needed for that, so it is done for all samples.
    """
    name, what = drawn[0].check, "prompts, tokens, texts and ends of the answers belong together"
    count = run.config.sampling.num_samples_per_prompt
    found = [sample for part in drawn for sample in part.samples]
    asked = [(one, at) for part in drawn for one in part.prompts for at in range(count)]
    if len(asked) != len(found):
        why = f"{len(found)} samples, expected {len(asked)}: {count} of each prompt"
        return differs(name, what, why, len(found), unit="samples")
    prefix = render_prefix(run.sampler.settings, run.sampler.renderer)
    room = run.sampler.settings.max_prompt_length - len(prefix)
    wrong, rendered = list[str](), dict[str, tuple[int, ...]]()
    for (prompt, number), sample in zip(asked, found, strict=True):
        if prompt.prompt_id not in rendered:
            ids = run.sampler.renderer.render_prompt(prompt.turns, room)
            rendered[prompt.prompt_id] = (*ids, *prefix)
        fault = _find_fault(run, sample, prompt, number, rendered[prompt.prompt_id])
        wrong += [f"sample {number} of prompt {prompt.prompt_id}: {fault}"] if fault else []
    return compare(name, what, wrong, len(found), unit="samples")


def _find_fault(
    run: Rollouts, sample: Sample, prompt: Prompt, number: int, rendered: tuple[int, ...]
) -> str:
    expected = dataclasses.replace(sample, prompt=prompt, sample_id=number)
    if records.sample_to_record(expected) != records.sample_to_record(sample):
        return "its prompt or number is another one"
    if tuple(sample.prompt_ids) != rendered:
        return "its prompt_ids are not the tokens of its prompt"
    text = run.sampler.renderer.decode_response(list(sample.response_ids))
    for stop in run.sampler.settings.stop:
        text = text.partition(stop)[0]
    if text != sample.output:
        return "its output is not the text of its response_ids"
    at_limit = len(sample.response_ids) >= run.sampler.settings.max_tokens
    if sample.finish_reason == FINISH_LENGTH and not at_limit:
        return "it ends as if cut by the token limit, which it has not reached"
    stops = {*run.sampler.stop_ids}
    if sample.response_ids and any(token in stops for token in sample.response_ids[:-1]):
        return "it goes on after a token that ends an answer"
    ended = sample.response_ids and sample.response_ids[-1] in stops
    if ended and sample.finish_reason != FINISH_STOP:
        return "it has a token that ends an answer, but another end"
    sums = None if sample.logps is None else math.fsum(sample.logps)
    if None not in (sums, sample.sum_logps) and sums != sample.sum_logps:
        return "its sum_logps is not the sum of its logps"
    return ""


def check_drawn(
    run: Rescorer,
    rollouts: Rollouts,
    params: Params,
    drawn: Sequence[Draws],
    chosen: Sequence[tuple[int, int]],
    *,
    is_same: bool,
    folder: Path,
) -> Finding:
    """Sample shards again with the policy `params` and compare them with what was recorded.

    Args:
      run: its trainer re-scores what is not the same.
      params: the policy as it sampled, with an adapter merged into it.
      chosen: from `choose_shards`.
      is_same: whether the run sampled them on what this job runs on.
      folder: an empty one, for the shards.
    """
    size = rollouts.config.sampling.shard_prompts
    what = f"shards of {size} prompts, drawn again with the same keys"
    name, total = drawn[0].check, sum(len(part.samples) for part in drawn)
    again = Again()
    for index, number in chosen:
        shard = drawn[index].take_shard(number, size)
        made = stages.sample_prompts(
            rollouts,
            params,
            shard.prompts,
            folder,
            round=shard.round,
            label=f"made-{index}-{number}",
        )
        again.add_shard(shard.samples, made)
    counts = again.equal + len(again.others), total, "samples"
    alike = passed(name, what, *counts, _name_shards(chosen))
    if not again.others:
        return alike
    programs = explain_programs()
    must_be_same = is_same and not programs and again.is_repeatable
    if sharding.take_from_first(int(must_be_same)):
        why = f"{len(again.others)} are not what this policy draws; {again.first}"
        return differs(name, what, why, *counts)
    if is_same:
        programs = programs or "by the run's programs, which repeat themselves here in no shard"
    temperature = rollouts.config.sampling.temperature
    return _score_again(run, temperature, params, again, alike, programs)


@dataclasses.dataclass
class Again:
    """Shards that were drawn again, compared with what was recorded.

    Attributes:
      equal: how many samples came out the same to the last bit, with `tokens` tokens.
      others: the others: as recorded, and as drawn again.
      first: where the first of them differs, and how.
      is_repeatable: whether a shard shows that this device repeats what the run has drawn: then
        the samples in it that are others are not explained by rounding. On a CPU always; elsewhere
        if most samples of the shard are the same to the last bit.
    """

    equal: int = 0
    tokens: int = 0
    others: list[tuple[Sample, Sample]] = dataclasses.field(default_factory=list)
    first: str = ""
    is_repeatable: bool = False

    def add_shard(self, recorded: Sequence[Sample], made: Sequence[Sample]) -> None:
        """Compare the samples of a shard."""
        others = len(self.others)
        for one, other in zip(recorded, made, strict=True):
            rows = [records.sample_to_record(_strip(sample)) for sample in (one, other)]
            difference = compare_rows(rows[:1], rows[1:])
            if not difference.first:
                self.equal += 1
                self.tokens += len(one.response_ids)
                continue
            self.others.append((one, other))
            self.first = self.first or f"{_name(one)}: {difference.first.partition(' ')[2]}"
        others = len(self.others) - others
        is_mostly_equal = 2 * others < len(recorded)
        if others and (is_mostly_equal or jax.default_backend() == "cpu"):
            self.is_repeatable = True

    def count_turns(self) -> tuple[int, int]:
        """Return how often another token was drawn after the same ones, and of how many tokens."""
        turns, tokens = 0, self.tokens
        for one, other in self.others:
            pairs = zip(one.response_ids, other.response_ids, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            is_other = one.response_ids != other.response_ids
            turns, tokens = turns + is_other, tokens + same + is_other
        return turns, tokens


def _strip(sample: Sample) -> Sample:
    """Return a sample as it was drawn, without a reward."""
    return dataclasses.replace(sample, reward=None)


def _name_shards(chosen: Sequence[tuple[int, int]]) -> str:
    several = any(index for index, _ in chosen)
    names = [f"{index}.{number}" if several else str(number) for index, number in chosen]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"shard{'s' if len(names) > 1 else ''} {shown}"


def _score_again(
    run: Rescorer,
    temperature: float,
    params: Params,
    again: Again,
    about: Finding,
    programs: str,
) -> Finding:
    """Judge samples that were not drawn again alike by a forward pass of the policy over them.

    Two things must hold. The recorded log-probabilities are those of the policy, within the run's
    bounds. And the draws with the same keys part as seldom as rounding explains: near ties turn
    over about as often as a token's log-probabilities are apart, other keys far more often.
    """
    name, counts = about.check, (about.checked, about.total, about.unit)
    what = "drawn again; where other tokens came out, the recorded ones re-scored"
    known = [one for one, _ in again.others if one.sum_logps is not None and one.response_ids]
    if not known:
        return not_checked(name, what, "no sum_logps are recorded to compare with", about.total)
    bounds = rescore.find_bounds(run.trainer.config)
    scored = score_tokens(run, params, known)
    mean, largest, wrong = _measure_gaps(known, scored, bounds)
    said = (
        f"a token's log-probability differs by {mean:.3g} on average and {largest:.3g} at most, "
        f"allowed: {bounds[0]:g} and {bounds[1]:g}"
    )
    if wrong:
        return differs(name, what, f"{said}; {wrong}", *counts)
    turns, tokens = again.count_turns()
    gap = _estimate_gap(known, scored)
    most = _FEW + _MARGIN * gap / temperature * tokens if temperature else math.inf
    if turns > most:
        why = (
            f"{said}; but the same keys drew another token {turns} times in {tokens} tokens, "
            f"which rounding explains {most:.0f} times at most"
        )
        return differs(name, what, why, *counts)
    why = f"{again.equal} are the same to the last bit, {turns} have other tokens; {said}"
    return passed(name, what, *counts, why=why + f"; {programs}" * bool(programs))


# Of draws that part: so many always may, and so many times as log-probabilities are apart.
_FEW, _MARGIN = 3, 4


def _measure_gaps(
    samples: Sequence[Sample], scored: Sequence[np.ndarray], bounds: tuple[float, float]
) -> tuple[float, float, str]:
    """Return the mean and the largest difference of a token's log-probability, and what is wrong.

    Where only the sum of an answer is recorded, its difference is spread over the tokens; besides,
    one token of it may be as far off as is allowed while the others add up as in a random walk:
    else an edited token would be lost in a long answer.
    """
    apart, tokens, largest, worst, wrong = 0.0, 0, 0.0, samples[0], ""
    for sample, logps in zip(samples, scored, strict=True):
        if sample.logps is not None:
            gaps = np.abs(np.asarray(sample.logps, np.float64) - logps)
        else:
            gap, most = abs(math.fsum(logps) - (sample.sum_logps or 0.0)), bounds[1]
            gaps, most = np.full(len(logps), gap / len(logps)), most + bounds[0] * len(logps) ** 0.5
            if not gap <= most:
                wrong = wrong or f"that of {_name(sample)} by {gap:.3g}, at most {most:.3g}"
        apart, tokens = apart + float(gaps.sum()), tokens + len(gaps)
        if not gaps.max() <= largest:  # so for NaN, too
            largest, worst = float(gaps.max()), sample
    mean = apart / tokens
    if not (mean <= bounds[0] and largest <= bounds[1]):
        wrong = f"the largest is in {_name(worst)}"
    return mean, largest, wrong


def _estimate_gap(samples: Sequence[Sample], scored: Sequence[np.ndarray]) -> float:
    """Return by how much the log-probability of a token differs on average, cautiously up.

    Of an answer with nothing but a sum, the differences of n tokens add up as in a random walk, to
    sqrt(n) times that of one.
    """
    gaps, tokens = 0.0, 0
    for sample, logps in zip(samples, scored, strict=True):
        if sample.logps is not None:
            gaps += float(np.abs(np.asarray(sample.logps, np.float64) - logps).sum())
        else:
            gaps += abs(math.fsum(logps) - (sample.sum_logps or 0.0)) * len(logps) ** 0.5
        tokens += len(logps)
    return gaps / tokens


def _name(sample: Sample) -> str:
    return f"sample {sample.sample_id} of prompt {sample.prompt.prompt_id}"


def score_tokens(run: Rescorer, params: Params, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return the log-probability f64[tokens] of each token of the answers, in one forward pass.

    Args:
      params: the policy, with an adapter merged into it.
    """
    items, members = make_group_items(
        samples, max_tokens=run.trainer.config.train.tokens_per_device
    )
    whole = dataclasses.replace(run.trainer, frozen=None)
    with compile_aside():
        found = training.compute_logps(whole, items, params, label="re-score")
    scored = [np.zeros(0)] * len(samples)
    for numbers, parts in zip(members, found, strict=True):
        for number, logps in zip(numbers, parts, strict=True):
            scored[number] = np.asarray(logps, np.float64)
    return scored
