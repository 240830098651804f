"""Prompts, demonstrations and feedback of a source (see `sources`), as many as were asked for."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from halos_jax.config import ConfigError, DataConfig
from halos_jax.data.records.edits import make_edits
from halos_jax.data.records.fields import NO_EDITS, Edits, Fields, RecordError
from halos_jax.data.records.formats import digest
from halos_jax.data.records.questions import read_prompt
from halos_jax.data.records.shapes import (
    is_feedback,
    read_demonstration,
    read_judgement,
    read_preference,
    read_scored,
)
from halos_jax.data.records.sources import find_benchmarks, read_sources
from halos_jax.data.records.turns import turns_to_record
from halos_jax.data.records.unread import Tally
from halos_jax.data.targets import Targets
from halos_jax.data.tokenize import split_preferences
from halos_jax.types import (
    Completion,
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which records of a source to take; the defaults take all of them, as they are.

    Attributes:
      split: only records whose field `split` has this value.
      limit: take a random subset of this many records (for samples with rewards, prompts); 0: all.
      seed: seed of all random choices; the same seed takes the same records.
      per_prompt: most preferences to take for each prompt; 0: all.
      keep_desirable: the share of the desirable answers to keep; `keep_undesirable`: of the others.
      collapse: replace runs of spaces and tabs by one space in all text (not in token ids).
      every_turn: learn all assistant turns of a conversation, not only the last one.
      best_only: learn one output per prompt from feedback (`targets.Targets`).
      edits: changes to records and conversations as they are read.
      margins: every pair must have rewards, or a margin.
    """

    split: str = ""
    limit: int = 0
    seed: int = 0
    per_prompt: int = 0
    keep_desirable: float = 1.0
    keep_undesirable: float = 1.0
    collapse: bool = False
    every_turn: bool = True
    best_only: bool = True
    edits: Edits = NO_EDITS
    margins: bool = False


ALL = Selection()


def select_train(data: DataConfig, seed: int) -> Selection:
    """Return the selection of `data.train` for a run with this seed."""
    return Selection(
        split=data.train_split,
        limit=data.max_train,
        seed=seed,
        per_prompt=data.max_prompt_count,
        keep_desirable=data.frac_unique_desirable,
        keep_undesirable=data.frac_unique_undesirable,
        collapse=data.collapse_whitespace,
        every_turn=data.learn_turns == "all",
        best_only=data.learn_outputs == "best",
        edits=make_edits(data),
    )


def select_eval(data: DataConfig) -> Selection:
    """Return the selection of `data.eval`: all of it, or the same `data.max_eval` for any seed."""
    return Selection(
        split=data.eval_split,
        limit=data.max_eval,
        collapse=data.collapse_whitespace,
        every_turn=data.learn_turns == "all",
        best_only=data.learn_outputs == "best",
        edits=make_edits(data),
    )


def warn_of_benchmarks(source: str) -> None:
    """Warn of data sets in `source` that are benchmarks, not training data."""
    for name in find_benchmarks(source):
        logger.warning(
            "data.train: %s is a benchmark: after training on it, results on it mean nothing", name
        )


def refuse_overlap(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> None:
    """Raise ConfigError if a prompt is both held out and trained on."""
    shared = {prompt.prompt_id for prompt in prompts} & {prompt.prompt_id for prompt in held_out}
    if shared:
        raise ConfigError(
            f"data.eval: {len(shared)} of its prompts are in data.train too (the first is "
            f"{sorted(shared)[0]}); allowed: no prompt in both; take them out of one of the files"
        )


def load_prompts(source: str, selection: Selection = ALL) -> list[Prompt]:
    """Load the distinct prompts of `source`, in its order.

    Duplicates are dropped and their number is logged. `prompt_id` is kept where a record has
    it, else it is a hash of the conversation.

    Args:
      source: see `sources.read_sources`.
      selection: its `split`, `limit`, `seed` and `collapse` count here.

    Raises:
      RecordError: for a bad record, a prompt that does not end with the user, or one id with two
        contents.
    """
    prompts: dict[str, Prompt] = {}
    duplicates = others = 0

    def read(fields: Fields) -> Prompt:
        prompt = _collapse_prompt(read_prompt(fields), selection)
        _check_same(prompts.get(prompt.prompt_id, prompt), prompt)
        return prompt

    for prompt in _read(source, selection, read):
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
    return choose(list(prompts.values()), selection.limit, selection.seed)


def load_demonstrations(source: str, selection: Selection = ALL) -> list[Demonstration]:
    """Load demonstrations for SFT; arguments as `load_prompts`.

    Takes prompt + completion / output / response / answer, messages that end with the assistant,
    prompt + chosen, samples, and feedback of every kind; `targets.Targets` chooses which outputs of
    the feedback are learned.
    """
    found: list[Demonstration] = []
    targets = Targets(best_only=selection.best_only)

    def read(fields: Fields) -> None:
        if not is_feedback(fields):
            found.append(read_demonstration(fields, every_turn=selection.every_turn))
        elif fields.has("output_A"):
            targets.add_preference(read_preference(fields))
        elif fields.peek("type") == "binary_feedback":
            targets.add_judgement(read_judgement(fields))
        else:
            targets.add_scored(read_demonstration(fields))

    for _ in _read(source, selection, read):
        pass
    found += targets.choose()
    if targets.left_out:
        logger.info(
            "%s: %d demonstrations; %d outputs of feedback left out",
            source,
            len(found),
            targets.left_out,
        )
    found = [_collapse(one, selection, ("completion",)) for one in found]
    return choose(_require_some(found, source), selection.limit, selection.seed)


def load_preferences(source: str, selection: Selection = ALL) -> list[Preference]:
    """Load preferences from pairwise_feedback or chosen/rejected records; as `load_prompts`."""
    reader = functools.partial(read_preference, margins=selection.margins)
    found = [
        _collapse(pair, selection, ("chosen", "rejected"))
        for pair in _read(source, selection, reader)
    ]
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
        if isinstance(one, Preference):
            preferences.append(_collapse(one, selection, ("chosen", "rejected")))
        else:
            judgements.append(_collapse(one, selection, ("completion",)))
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
            prompt = _collapse_prompt(sample.prompt, selection)
            output = _collapse_text(sample.output) if selection.collapse else sample.output
            samples.append(dataclasses.replace(sample, prompt=prompt, output=output))
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


def _read(source: str, selection: Selection, reader: Callable[[Fields], _Item]) -> Iterator[_Item]:
    """Yield the reader's result for each record; at the end, log which fields were not used.

    Raises:
      RecordError: for a bad record, unless bad records are left out.
    """
    tally = Tally(source, selection.edits)
    for fields in read_sources(source, selection.split, selection.edits, on_bad=tally.skip):
        try:
            found = reader(fields)
        except RecordError as error:
            tally.skip(error)
            continue
        tally.add(fields)
        yield found
    tally.report()


def _read_judged(fields: Fields) -> Judgement | Preference:
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


# --------------------------------------------------------------------------- whitespace


def _collapse(record: Any, selection: Selection, completions: Iterable[str]) -> Any:
    """Return a record with its text collapsed, if asked for, in its prompt and `completions`."""
    if not selection.collapse:
        return record
    changed: dict[str, Any] = {"prompt": _collapse_prompt(record.prompt, selection)}
    for name in completions:
        completion: Completion = getattr(record, name)
        changed[name] = dataclasses.replace(completion, turns=_collapse_turns(completion.turns))
    return dataclasses.replace(record, **changed)


def _collapse_prompt(prompt: Prompt, selection: Selection) -> Prompt:
    if not selection.collapse:
        return prompt
    return dataclasses.replace(prompt, turns=_collapse_turns(prompt.turns))


def _collapse_turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(dataclasses.replace(turn, content=_collapse_text(turn.content)) for turn in turns)


def _collapse_text(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text)


def _check_same(known: Prompt, prompt: Prompt) -> None:
    if known.turns != prompt.turns:
        raise RecordError(
            f"{prompt.place}: field 'prompt_id': got {prompt.prompt_id!r}, allowed: an id of its "
            f"own ({known.place} has this id and another conversation); change it, or leave "
            "'prompt_id' out of the records"
        )
