"""Prompts, demonstrations and feedback of a source (see `sources`), as many as were asked for."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.data import holdout
from halos_jax.data.records.fields import Fields, RecordError
from halos_jax.data.records.formats import digest, make_prompt_id
from halos_jax.data.records.questions import read_prompt
from halos_jax.data.records.shapes import (
    is_feedback,
    read_demonstration,
    read_judgement,
    read_preference,
    read_scored,
    refuse_weight,
)
from halos_jax.data.records.sources import find_benchmarks, read_sources
from halos_jax.data.records.turns import turns_to_record
from halos_jax.data.records.unread import Tally
from halos_jax.data.selection import ALL, Selection
from halos_jax.data.targets import Targets
from halos_jax.data.tokenize import split_preferences
from halos_jax.data.whitespace import collapse_prompt, collapse_record, collapse_text
from halos_jax.types import (
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Sample,
)

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


def warn_of_benchmarks(source: str) -> None:
    """Warn of data sets in `source` that are benchmarks, not training data."""
    for name in find_benchmarks(source):
        logger.warning(
            "data.train: %s is a benchmark: after training on it, results on it mean nothing", name
        )


def refuse_overlap(
    prompts: Sequence[Prompt],
    others: Sequence[Prompt],
    *,
    field: str = "data.eval",
    known: str = "data.train",
) -> None:
    """Raise ConfigError if one of the `others`, which are held out, is among `prompts`.

    A conversation counts whatever its id; in data.eval, one with another id is a warning, so that
    runs begun before can go on.

    Args:
      field: the source of the others.
      known: the source of the prompts.
    """
    if not others:
        return
    ids, talks = {one.prompt_id for one in prompts}, {make_prompt_id(one.turns) for one in prompts}
    same = [one.prompt_id in ids for one in others]
    twin = [make_prompt_id(one.turns) in talks for one in others]
    either = same if field == "data.eval" else [a or b for a, b in zip(same, twin, strict=True)]
    places = [one.place or one.prompt_id for one in others]
    twins = [place for place, is_one in zip(places, twin, strict=True) if is_one]
    shared = [place for place, is_one in zip(places, either, strict=True) if is_one]
    if shared:
        raise ConfigError(
            f"{field}: {len(shared)} of its prompts are in {known} too (the first is "
            f"{shared[0]}); allowed: no prompt in both; take them out of one of the files"
        )
    if twins:
        logger.warning(
            "%s: %d of its prompts are in %s too, under other ids (the first is %s): they are no "
            "measure of what is learned; take them out of one of the files",
            field,
            len(twins),
            known,
            twins[0],
        )


def load_prompts(source: str, selection: Selection = ALL) -> list[Prompt]:
    """Load the distinct prompts of `source`, in its order.

    Duplicates are dropped and their number is logged. `prompt_id` is kept where a record has
    it, else it is a hash of the conversation.

    Args:
      source: see `sources.read_sources`.
      selection: its `split`, `limit`, `seed`, `collapse` and `holdout` count here.

    Raises:
      RecordError: for a bad record, a prompt that does not end with the user, or one id with two
        contents.
    """
    prompts: dict[str, Prompt] = {}
    duplicates = others = 0

    def read(fields: Fields) -> Prompt:
        prompt = read_prompt(fields)
        prompt = collapse_prompt(prompt) if selection.collapse else prompt
        _check_same(prompts.get(prompt.prompt_id, prompt), prompt)
        return prompt

    for prompt in _read(source, dataclasses.replace(selection, holdout=0), read):
        known = prompts.setdefault(prompt.prompt_id, prompt)
        duplicates += known is not prompt
        others += known is not prompt and known.extra != prompt.extra
    if duplicates:
        logger.info("%s: %d prompts, %d exact duplicates dropped", source, len(prompts), duplicates)
    if others:
        logger.warning(
            "%s: %d of the duplicates have other fields than the first record of their prompt; the "
            "first record's count",
            source,
            others,
        )
    found = list(prompts.values())
    if selection.holdout:
        found = holdout.split_prompts(found, selection.holdout)[selection.is_held]
        logger.info("%s: %d prompts held out (data.holdout)", source, selection.holdout)
    return choose(found, selection.limit, selection.seed)


def load_demonstrations(source: str, selection: Selection = ALL) -> list[Demonstration]:
    """Load demonstrations for SFT; arguments as `load_prompts`.

    Takes prompt + completion / output / response / answer, messages that end with the assistant,
    prompt + chosen, samples, and feedback of every kind; `targets.Targets` chooses which outputs of
    the feedback are taken.
    """
    found: list[Demonstration] = []
    targets = Targets(best_only=selection.best_only, every=selection.every_output)
    reader = functools.partial(_read_taught, selection=selection)
    for is_scored, one in _read(source, selection, reader, prompt_of=lambda read: read[1].prompt):
        if isinstance(one, Preference):
            targets.add_preference(one)
        elif isinstance(one, Judgement):
            targets.add_judgement(one)
        elif is_scored:
            targets.add_scored(one)
        else:
            found.append(one)
    found += targets.choose()
    if targets.left_out:
        logger.info(
            "%s: %d demonstrations; %d outputs of feedback left out",
            source,
            len(found),
            targets.left_out,
        )
    if selection.collapse:
        found = [collapse_record(one, ("completion",)) for one in found]
    return choose(_require_some(found, source), selection.limit, selection.seed)


def load_preferences(source: str, selection: Selection = ALL) -> list[Preference]:
    """Load preferences from pairwise_feedback or chosen/rejected records; as `load_prompts`."""
    reader = functools.partial(read_preference, margins=selection.margins)
    found = list(_read(source, selection, reader))
    if selection.collapse:
        found = [collapse_record(pair, ("chosen", "rejected")) for pair in found]
    found = _limit_pairs(found, source, selection)
    return choose(_require_some(found, source), selection.limit, selection.seed)


def load_judgements(source: str, selection: Selection = ALL) -> list[Judgement]:
    """Load answers with their labels; arguments as `load_prompts`.

    Takes binary_feedback, TRL's unpaired records (prompt, completion, label), and every record of
    `load_preferences`, whose chosen answer is desirable and whose rejected one is not.
    `selection.limit` counts records; the shares to keep are of distinct answers.
    """
    judgements: list[Judgement] = []
    preferences: list[Preference] = []
    for one in _read(source, selection, _read_judged):
        if selection.collapse:
            is_pair = isinstance(one, Preference)
            one = collapse_record(one, ("chosen", "rejected") if is_pair else ("completion",))
        if isinstance(one, Preference):
            preferences.append(one)
        else:
            judgements.append(one)
    preferences = _limit_pairs(preferences, source, selection)
    chosen = choose([*judgements, *preferences], selection.limit, selection.seed)
    judgements = [one for one in chosen if isinstance(one, Judgement)]
    preferences = [one for one in chosen if isinstance(one, Preference)]
    found = judgements + split_preferences(preferences)
    return _require_some(_thin_out(found, source, selection), source)


def load_scored(source: str, selection: Selection = ALL) -> list[Sample]:
    """Load samples with rewards (scalar_feedback); arguments as `load_prompts`.

    Samples without a reward are left out, and their number is logged. `selection.limit` counts
    prompts; all samples of a chosen prompt are taken.
    """
    samples, unlabelled = [], 0
    for sample in _read(source, selection, _read_group_member):
        unlabelled += sample.reward is None
        if sample.reward is not None:
            if selection.collapse:
                prompt, output = collapse_prompt(sample.prompt), collapse_text(sample.output)
                sample = dataclasses.replace(sample, prompt=prompt, output=output)
            samples.append(sample)
    if unlabelled:
        logger.info("%s: %d samples, %d without a reward", source, len(samples), unlabelled)
    prompts = list(dict.fromkeys(sample.prompt.key for sample in _require_some(samples, source)))
    kept = set(choose(prompts, selection.limit, selection.seed))
    return [sample for sample in samples if sample.prompt.key in kept]


def load_samples(source: str, selection: Selection = ALL) -> list[Sample]:
    """Load samples, with or without rewards; `extra` holds all other fields of their records."""
    return list(_read(source, selection, read_scored))


def has_scores(source: str, selection: Selection = ALL) -> bool:
    """Tell whether `source` holds samples with rewards rather than labels or pairs.

    Its first record decides: one with a reward, and neither a label nor a second answer.
    """
    for fields in read_sources(source, "", selection.edits, on_bad=lambda error: None):
        others = ("label", "output_A", "chosen")
        return fields.has("reward") and not any(fields.has(name) for name in others)
    return False


def _read(
    source: str,
    selection: Selection,
    reader: Callable[[Fields], _Item],
    *,
    prompt_of: Callable[[Any], Prompt] = lambda read: read.prompt,
) -> Iterable[_Item]:
    """Return the reader's results for the records that are on the selection's side of the holdout.

    At the end of the records, log which of their fields were not used.

    Args:
      prompt_of: returns the prompt of such a result.

    Raises:
      RecordError: for a bad record, unless bad records are left out.
      ConfigError: if the holdout leaves nothing to train on.
    """
    found = _read_all(source, selection, reader)
    if not selection.holdout:
        return found

    def make_key(read: _Item) -> str:
        prompt = prompt_of(read)
        return holdout.make_key(collapse_prompt(prompt) if selection.collapse else prompt)

    read = [(make_key(one), one) for one in found]
    held = holdout.choose_held((key for key, _ in read), selection.holdout)
    kept = [one for key, one in read if (key in held) == selection.is_held]
    if not selection.is_held:
        logger.info(
            "%s: the %d records of %d prompts are held out (data.holdout)",
            source,
            len(read) - len(kept),
            len(held),
        )
    return kept


def _read_all(
    source: str, selection: Selection, reader: Callable[[Fields], _Item]
) -> Iterator[_Item]:
    tally = Tally(source, selection.edits)
    for fields in read_sources(source, selection.split, selection.edits, on_bad=tally.skip):
        try:
            found = reader(fields)
        except RecordError as error:
            tally.skip(error)
            continue
        tally.add(fields)
        yield found
    if not selection.is_held:  # else it was said when the training records were read
        tally.report()


def _read_taught(
    fields: Fields, *, selection: Selection
) -> tuple[bool, Demonstration | Preference | Judgement]:
    """Read a record for SFT; return also whether it is a sample with a score."""
    is_pair = fields.has("output_A") or (selection.every_output and fields.has("rejected"))
    if not (is_feedback(fields) or is_pair):
        return False, read_demonstration(fields, every_turn=selection.every_turn)
    refuse_weight(fields)  # an answer that is learned has none
    if is_pair:
        return False, read_preference(fields)
    if fields.peek("type") == "binary_feedback":
        return False, read_judgement(fields)
    return True, read_demonstration(fields)


def _read_judged(fields: Fields) -> Judgement | Preference:
    refuse_weight(fields)  # a single answer has none
    is_pair = fields.has("output_A") or fields.has("chosen")
    return (read_preference if is_pair else read_judgement)(fields)


def _read_group_member(fields: Fields) -> Sample:
    if not fields.has("prompt_id", "sample_id", "output"):
        raise fields.error(
            "prompt_id, sample_id, output",
            sorted(fields.record),
            "HALOs' scalar_feedback, which has these, prompt and reward (`task=label` writes "
            "it); a group is what has one prompt_id",
        )
    return read_scored(fields)


def order_prompts(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """Return the prompts in the fixed order of a run, which does not depend on their order."""
    return sorted(
        prompts, key=lambda prompt: (digest("order", seed, prompt.prompt_id), prompt.prompt_id)
    )


def identify_prompts(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of prompts in order, from which a resumed run knows they are the same."""
    return digest([[prompt.prompt_id, turns_to_record(prompt.turns)] for prompt in prompts])


# --------------------------------------------------------------------------- selection


def choose(items: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    """Return a random subset of `count` items (0: all) in their order; with the same seed, a
    larger subset contains it."""
    if not count or count >= len(items):
        return list(items)
    kept = np.random.default_rng([seed, 0]).permutation(len(items))[:count]
    return [items[index] for index in sorted(kept)]


def _limit_pairs(pairs: list[Preference], source: str, selection: Selection) -> list[Preference]:
    if not selection.per_prompt:
        return pairs
    by_prompt: dict[tuple[object, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt.key, []).append(number)
    kept = set()
    for numbers in by_prompt.values():
        kept.update(choose(numbers, selection.per_prompt, selection.seed))
    if len(kept) < len(pairs):
        logger.info(
            "%s: %d of %d pairs kept by data.max_prompt_count", source, len(kept), len(pairs)
        )
    return [pair for number, pair in enumerate(pairs) if number in kept]


def _thin_out(found: list[Judgement], source: str, selection: Selection) -> list[Judgement]:
    shares = {True: selection.keep_desirable, False: selection.keep_undesirable}
    if min(shares.values()) == 1:
        return found
    kept: set[tuple[object, ...]] = set()
    for desirable, share in shares.items():
        names = [_answer_key(one) for one in found if one.desirable == desirable]
        names = list(dict.fromkeys(names))
        count = round(share * len(names))
        kept.update(choose(names, count, selection.seed) if count else ())
    thinned = [one for one in found if _answer_key(one) in kept]
    logger.info("%s: %d of %d answers: data.frac_unique_*", source, len(thinned), len(found))
    return thinned


def _answer_key(one: Judgement) -> tuple[object, ...]:
    return one.prompt.key, one.completion.turns, one.completion.ids, one.desirable


def _require_some(items: list[_Item], source: str) -> list[_Item]:
    if not items:
        raise RecordError(f"{source}: nothing to train on is left of its records")
    return items


def _check_same(known: Prompt, prompt: Prompt) -> None:
    if known.turns != prompt.turns:
        raise RecordError(
            f"{prompt.place}: field 'prompt_id': got {prompt.prompt_id!r}, allowed: an id of its "
            f"own ({known.place} has this id and another conversation); change it, or leave "
            "'prompt_id' out of the records"
        )
