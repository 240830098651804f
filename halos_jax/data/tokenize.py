"""From records to training items: token ids through the one renderer, cut to length."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import (
    Lengths,
    cut_response,
    fit_response,
    is_truncated,
    report_truncated,
)
from halos_jax.data.records.reading import OnBad, raise_error
from halos_jax.data.texts import Ids, Texts, make_array
from halos_jax.errors import UserError
from halos_jax.types import (
    CHOSEN,
    FINISH_STOP,
    MEMBER,
    MISMATCHED,
    REJECTED,
    TARGET,
    Completion,
    Item,
    Judgement,
    Preference,
    Sample,
)

logger = logging.getLogger(__name__)

_Source = TypeVar("_Source")


def make_each(
    sources: Iterable[_Source],
    make: Callable[[_Source], Iterable[Item | None]],
    noun: str,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return the items that `make` makes of each source (a record, or several), in their order.

    Args:
      make: yields None for an item that is left out because its answer is truncated.
      noun: what to call the sources in the log ("pairs").
      on_bad: called with the error of a source that cannot become an item; if it returns, the
        source is left out.
    """
    items: list[Item] = []
    truncated = 0
    for source in sources:
        try:
            made = list(make(source))
        except UserError as error:
            on_bad(error)
            continue
        kept = [item for item in made if item is not None]
        truncated += len(made) - len(kept)
        items += kept
    report_truncated(truncated, len(items), noun)
    return items


def make_pair_items(
    preferences: Iterable[Preference],
    renderer: Renderer,
    lengths: Lengths,
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return one item (chosen, rejected) a preference.

    Feedback that carries token ids keeps them as they were sampled; text is rendered.

    Raises:
      ConfigError: if a prompt leaves no room for a response, unless `on_bad` leaves it out.
    """
    preferences = list(preferences)
    texts = Texts(
        renderer,
        (one.prompt.turns for one in preferences if not one.prompt_ids),
        (half for one in preferences for half in (one.chosen, one.rejected)),
        lengths,
    )

    def make(preference: Preference) -> Iterator[Item | None]:
        prompt_ids = make_array(preference.prompt_ids or texts.prompt(preference.prompt))
        pair = (preference.chosen, preference.rejected)
        found = [_fit(one, texts, prompt_ids, lengths, preference.prompt.place) for one in pair]
        responses = tuple(response for response, _ in found)
        rewards = (preference.chosen.reward or 0.0, preference.rejected.reward or 0.0)
        item = Item(prompt_ids, responses, (CHOSEN, REJECTED), rewards, preference.weight)
        known = [one.logps for one in pair if one.logps is not None and one.ids]
        if len(known) == len(pair):
            item = dataclasses.replace(item, old_logps=_cut_logps(known, responses))
        yield None if any(truncated for _, truncated in found) else item

    return make_each(preferences, make, "pairs", on_bad)


def make_controlled_items(
    judgements: Iterable[Judgement],
    renderer: Renderer,
    lengths: Lengths,
    control: tuple[str, str],
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return one item (target) a judgement, whose prompt ends with a control token.

    Prompts are rendered from their turns: ids that were sampled with `sampling.prefix` end with a
    control token already.

    Args:
      control: the control tokens before desirable answers and before others.

    Raises:
      ConfigError: if a prompt leaves no room for a response, unless `on_bad` leaves it out.
    """
    prefixes = [renderer.render_prefix(text) for text in control]
    for text, prefix in zip(control, prefixes, strict=True):
        if len(prefix) > 1:
            logger.warning(
                "the control text %r is %d tokens to this tokenizer; as a token of its own, by "
                "--config.model.added_tokens, it says nothing else",
                text,
                len(prefix),
            )
    judgements = list(judgements)
    classes = {}
    for desirable, prefix in zip((True, False), prefixes, strict=True):
        members = [one for one in judgements if one.desirable == desirable]
        prompts = (one.prompt.turns for one in members)
        completions = (one.completion for one in members)
        reserved = dataclasses.replace(lengths, behind=len(prefix))
        classes[desirable] = Texts(renderer, prompts, completions, reserved)

    def make(judgement: Judgement) -> Iterator[Item | None]:
        texts = classes[judgement.desirable]
        prefix = prefixes[not judgement.desirable]
        prompt_ids = make_array((*texts.prompt(judgement.prompt), *prefix))
        place, answer = judgement.prompt.place, judgement.completion
        response, truncated = _fit(answer, texts, prompt_ids, lengths, place)
        item = Item(prompt_ids, (response,), (TARGET,), desirable=judgement.desirable)
        yield None if truncated else item

    return make_each(judgements, make, "answers", on_bad)


def make_unpaired_items(
    judgements: Sequence[Judgement],
    renderer: Renderer,
    lengths: Lengths,
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return one item (target, mismatched) a judgement.

    The mismatched response is that of the next judgement with another prompt (if all have the same
    prompt, of any other judgement) whose response differs. It is chosen here, so that reference and
    policy see the same one, whatever shares a batch later. An example for which there is none has
    its target alone.

    Raises:
      ConfigError: if a prompt leaves no room for a response, unless `on_bad` leaves it out.
    """
    texts = _render_judged(judgements, renderer, lengths)
    responses = [texts.response(one.completion) for one in judgements]
    numbers: dict[object, int] = {}  # prompts are long to compare
    groups = [numbers.setdefault(_identify(one, texts), len(numbers)) for one in judgements]

    def make(number: int) -> Iterator[Item | None]:
        judgement = judgements[number]
        prompt = make_array(judgement.prompt_ids or texts.prompt(judgement.prompt))
        place, answer = judgement.prompt.place, judgement.completion
        own, truncated = _fit(answer, texts, prompt, lengths, place)
        if truncated:
            yield None
            return
        others = (
            cut_response(responses[other], len(prompt), lengths)
            for other in _following(number, len(judgements))
            if len(numbers) == 1 or groups[other] != groups[number]
        )
        mismatched = next((other for other in others if not np.array_equal(other, own)), None)
        found = (own,) if mismatched is None else (own, mismatched)
        roles = (TARGET, MISMATCHED)[: len(found)]
        yield Item(prompt, found, roles, desirable=judgement.desirable)

    return make_each(range(len(judgements)), make, "answers", on_bad)


def make_answer_items(
    judgements: Sequence[Judgement],
    renderer: Renderer,
    lengths: Lengths,
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return one item (member) a judgement, with reward 1 where it is desirable, else -1.

    Raises:
      ConfigError: if a prompt leaves no room for a response, unless `on_bad` leaves it out.
    """
    texts = _render_judged(judgements, renderer, lengths)

    def make(judgement: Judgement) -> Iterator[Item | None]:
        prompt_ids = make_array(judgement.prompt_ids or texts.prompt(judgement.prompt))
        place, answer = judgement.prompt.place, judgement.completion
        response, truncated = _fit(answer, texts, prompt_ids, lengths, place)
        rewards = (1.0 if judgement.desirable else -1.0,)
        item = Item(prompt_ids, (response,), (MEMBER,), rewards, desirable=judgement.desirable)
        yield None if truncated else item

    return make_each(judgements, make, "answers", on_bad)


def _render_judged(judgements: Sequence[Judgement], renderer: Renderer, lengths: Lengths) -> Texts:
    return Texts(
        renderer,
        (one.prompt.turns for one in judgements if not one.prompt_ids),
        (one.completion for one in judgements),
        lengths,
    )


def _fit(
    completion: Completion, texts: Texts, prompt_ids: Ids, lengths: Lengths, place: str
) -> tuple[np.ndarray, bool]:
    """Return a completion's ids i32[response], cut to fit, and whether it is left out for that."""
    ids = texts.response(completion)
    response = fit_response(ids, len(prompt_ids), lengths, place)
    return response, is_truncated(lengths, completion, ids, response)


def _identify(judgement: Judgement, texts: Texts) -> object:
    """Return the identity of a judgement's prompt: its tokens, or its turns if it has none."""
    try:
        return make_array(judgement.prompt_ids or texts.prompt(judgement.prompt)).tobytes()
    except ConfigError:
        return judgement.prompt.turns


def make_scored_items(
    samples: Sequence[Sample],
    renderer: Renderer,
    lengths: Lengths,
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return one item a prompt: all its samples that have a reward, as one group.

    Token ids are kept as they were sampled; text is rendered. The samples' log-probabilities are
    kept where all samples of the prompt have them.

    Raises:
      ConfigError: if a prompt leaves no room for a response, or only some of its samples say what
        they were drawn from, unless `on_bad` leaves its group out.
    """
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        if sample.reward is not None:
            # By its tokens too: those of the first sample are the prompt of the whole group.
            groups.setdefault((sample.prompt.key, sample.prompt_ids), []).append(sample)

    def make(group: Sequence[Sample]) -> Iterator[Item | None]:
        item = _make_scored_item(group, renderer, lengths)
        yield None if item.masks and not any(item.num_targets) else item

    return make_each(groups.values(), make, "groups", on_bad)


def _make_scored_item(group: Sequence[Sample], renderer: Renderer, lengths: Lengths) -> Item:
    asked = group[0].prompt
    prompt: Ids = group[0].prompt_ids
    if not prompt:
        texts = Texts(renderer, (asked.turns,), (), lengths)
        prompt = texts.prompt(asked)
    whole = [
        one.response_ids
        or renderer.render_response(one.output, finished=one.finish_reason == FINISH_STOP)
        for one in group
    ]
    responses = tuple(fit_response(ids, len(prompt), lengths, asked.place) for ids in whole)
    truncated = [
        is_truncated(lengths, one, ids, response)
        for one, ids, response in zip(group, whole, responses, strict=True)
    ]
    masks: tuple[np.ndarray, ...] = ()
    if any(truncated):
        pairs = zip(responses, truncated, strict=True)
        masks = tuple(np.full(len(response), not cut) for response, cut in pairs)
    drawn = tuple(
        one.drawn.cut(len(response))
        for one, response in zip(group, responses, strict=True)
        if one.drawn is not None and one.response_ids
    )
    if drawn and len(drawn) < len(group):
        raise ConfigError(
            f"{asked.place or asked.prompt_id}: {len(drawn)} of the {len(group)} samples of this "
            "prompt say what their tokens were drawn from ('drawn' in the records); allowed: all "
            "or none; leave the field out by data.ignore_fields=drawn"
        )
    known = [one.logps for one in drawn or group if one.logps is not None]
    old_logps: tuple[np.ndarray, ...] = ()
    if len(known) == len(group) and all(one.response_ids for one in group):
        old_logps = _cut_logps(known, responses)
    return Item(
        make_array(prompt),
        responses,
        (MEMBER,) * len(group),
        tuple(float(one.reward) for one in group if one.reward is not None),
        old_logps=old_logps,
        masks=masks,
        drawn=drawn,
    )


def _cut_logps(
    known: Sequence[Sequence[float]], responses: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Return the log-probabilities f32[response] of responses, which were cut to fit."""
    return tuple(
        np.asarray(logps[: len(response)], np.float32)
        for logps, response in zip(known, responses, strict=True)
    )


def split_preferences(preferences: Iterable[Preference]) -> list[Judgement]:
    """Return the halves of preferences as desirable and undesirable judgements, without repeats."""
    found: dict[tuple[object, ...], Judgement] = {}
    for preference in preferences:
        for completion, desirable in ((preference.chosen, True), (preference.rejected, False)):
            key = (preference.prompt.key, completion.turns, completion.ids, desirable)
            judgement = Judgement(preference.prompt, completion, desirable, preference.prompt_ids)
            found.setdefault(key, judgement)
    return list(found.values())


def make_group_items(
    samples: Sequence[Sample], *, max_tokens: int
) -> tuple[list[Item], list[list[int]]]:
    """Return items that hold consecutive samples of a prompt, and which samples each holds.

    Args:
      samples: with the ids to be used in `prompt_ids` and `response_ids`.
      max_tokens: a prompt's samples are split over several items where one would be longer.
    """
    items, members = [], []
    group: list[int] = []

    def close() -> None:
        if group:
            responses = tuple(make_array(samples[i].response_ids) for i in group)
            prompt_ids = make_array(samples[group[0]].prompt_ids)
            items.append(Item(prompt_ids, responses, (MEMBER,) * len(group)))
            members.append(list(group))
            group.clear()

    size = 0
    for index, sample in enumerate(samples):
        length = len(sample.response_ids)
        same = group and samples[group[0]].prompt_ids == sample.prompt_ids
        if not same or size + length > max_tokens:
            close()
            size = len(sample.prompt_ids)
        group.append(index)
        size += length
    close()
    return items, members


def _following(number: int, count: int) -> Iterator[int]:
    """Yield all other numbers below `count`, from the next one on and around the end."""
    return itertools.chain(range(number + 1, count), range(number))
