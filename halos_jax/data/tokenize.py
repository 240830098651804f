"""From records to training items: token ids through the one renderer, cut to length."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from halos_jax.config import Config, ConfigError
from halos_jax.data.chat import Renderer
from halos_jax.types import (
    CHOSEN,
    FINISH_LENGTH,
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


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens: of the prompt, and of prompt and response together.

    A response is truncated where `total` cuts it, or where its sampler's token limit did. With
    `mask_truncated` it carries no loss: a pair with such a response, a judgement of one and a
    demonstration (the last turn of a conversation) are left out, and counted in the log. In a
    group the others' statistics still count its reward, but none of its tokens is a target.
    """

    prompt: int
    total: int
    mask_truncated: bool = False


def make_lengths(config: Config) -> Lengths:
    """Return the limits of a run's training items."""
    return Lengths(
        config.sampling.max_prompt_length, config.train.max_length, config.train.mask_truncated
    )


def make_pair_items(
    preferences: Iterable[Preference], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return one item (chosen, rejected) a preference.

    Feedback that carries token ids keeps them as they were sampled; text is rendered.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    items, truncated = [], 0
    # Feedback repeats its texts: 25 models against one baseline are 25 times the same prompt.
    render_prompt = functools.cache(
        functools.partial(renderer.render_prompt, max_length=lengths.prompt)
    )
    render_response = functools.cache(renderer.render_response)
    for preference in preferences:
        prompt_ids = preference.prompt_ids or render_prompt(preference.prompt.turns)
        pair = (preference.chosen, preference.rejected)
        sources = [_response_ids(completion, render_response) for completion in pair]
        responses = tuple(cut_response(ids, len(prompt_ids), lengths) for ids in sources)
        if any(map(functools.partial(is_truncated, lengths), pair, sources, responses)):
            truncated += 1
            continue
        rewards = (preference.chosen.reward or 0.0, preference.rejected.reward or 0.0)
        items.append(Item(_array(prompt_ids), responses, (CHOSEN, REJECTED), rewards))
    report_truncated(truncated, len(items), "pairs")
    return items


def make_controlled_items(
    judgements: Iterable[Judgement], renderer: Renderer, lengths: Lengths, control: tuple[str, str]
) -> list[Item]:
    """Return one item (target) a judgement, whose prompt ends with a control token.

    Prompts are rendered from their turns: ids that were sampled with `sampling.prefix` end with a
    control token already.

    Args:
      control: what begins the answer where it is desirable, and where it is not.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    prefixes = [renderer.render_prefix(text) for text in control]
    render_response = functools.cache(renderer.render_response)
    items, truncated = [], 0
    for judgement in judgements:
        prefix = prefixes[not judgement.desirable]
        room = lengths.prompt - len(prefix)
        prompt_ids = (*renderer.render_prompt(judgement.prompt.turns, room), *prefix)
        ids = _response_ids(judgement.completion, render_response)
        response = cut_response(ids, len(prompt_ids), lengths)
        if is_truncated(lengths, judgement.completion, ids, response):
            truncated += 1
            continue
        items.append(
            Item(_array(prompt_ids), (response,), (TARGET,), desirable=judgement.desirable)
        )
    report_truncated(truncated, len(items), "answers")
    return items


def make_unpaired_items(
    judgements: Sequence[Judgement], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return one item (target, mismatched) a judgement.

    The mismatched response is that of the next judgement of another prompt; of any other one with
    another response, where all have one prompt. It is chosen here, so that whatever shares a batch
    later, reference and policy see the same pairs, and it never is the example's own response. An
    example for which there is none has its target alone.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    render_prompt = functools.cache(
        functools.partial(renderer.render_prompt, max_length=lengths.prompt)
    )
    render_response = functools.cache(renderer.render_response)
    prompts = [tuple(j.prompt_ids or render_prompt(j.prompt.turns)) for j in judgements]
    responses = [_response_ids(j.completion, render_response) for j in judgements]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    groups = [numbers[prompt] for prompt in prompts]  # by number: prompts are long to compare
    items, truncated = [], 0
    for number, (judgement, prompt) in enumerate(zip(judgements, prompts, strict=True)):
        own = cut_response(responses[number], len(prompt), lengths)
        if is_truncated(lengths, judgement.completion, responses[number], own):
            truncated += 1
            continue
        others = (
            cut_response(responses[other], len(prompt), lengths)
            for other in _following(number, len(prompts))
            if len(numbers) == 1 or groups[other] != groups[number]
        )
        mismatched = next((other for other in others if not np.array_equal(other, own)), None)
        found = (own,) if mismatched is None else (own, mismatched)
        roles = (TARGET, MISMATCHED)[: len(found)]
        items.append(Item(_array(prompt), found, roles, desirable=judgement.desirable))
    report_truncated(truncated, len(items), "answers")
    return items


def make_scored_items(
    samples: Sequence[Sample], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return one item a prompt: all its samples that have a reward, as one group.

    Token ids are kept as they were sampled; text is rendered. The samples' log-probabilities are
    kept where all samples of the prompt have them.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.reward is not None:
            groups.setdefault(sample.prompt.prompt_id, []).append(sample)
    items, truncated = [], 0
    for group in groups.values():
        item = _make_scored_item(group, renderer, lengths)
        if item.masks and not any(item.num_targets):
            truncated += 1
        else:
            items.append(item)
    report_truncated(truncated, len(items), "groups")
    return items


def _make_scored_item(group: Sequence[Sample], renderer: Renderer, lengths: Lengths) -> Item:
    prompt = group[0].prompt_ids or renderer.render_prompt(group[0].prompt.turns, lengths.prompt)
    sources = [
        one.response_ids
        or renderer.render_response(one.output, finished=one.finish_reason == FINISH_STOP)
        for one in group
    ]
    responses = tuple(cut_response(ids, len(prompt), lengths) for ids in sources)
    masks, old_logps = (), ()
    if any(map(functools.partial(is_truncated, lengths), group, sources, responses)):
        masks = tuple(
            np.full(len(response), not is_truncated(lengths, one, ids, response))
            for one, ids, response in zip(group, sources, responses, strict=True)
        )
    if all(one.logps is not None and one.response_ids for one in group):
        old_logps = tuple(
            np.asarray(one.logps[: len(response)], np.float32)
            for one, response in zip(group, responses, strict=True)
        )
    return Item(
        _array(prompt),
        responses,
        (MEMBER,) * len(group),
        tuple(float(one.reward) for one in group),
        old_logps=old_logps,
        masks=masks,
    )


def split_preferences(preferences: Iterable[Preference]) -> list[Judgement]:
    """Return the halves of preferences as desirable and undesirable, each of them once."""
    found: dict[tuple, Judgement] = {}
    for preference in preferences:
        for completion, desirable in ((preference.chosen, True), (preference.rejected, False)):
            key = (preference.prompt.prompt_id, completion.turns, completion.ids, desirable)
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
            responses = tuple(_array(samples[i].response_ids) for i in group)
            prompt_ids = _array(samples[group[0]].prompt_ids)
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


def _response_ids(completion: Completion, render: Callable[..., Sequence[int]]) -> Sequence[int]:
    if completion.ids:
        return completion.ids
    text = "".join(turn.content for turn in completion.turns)
    return render(text, finished=completion.finish_reason == FINISH_STOP)


def cut_response(ids: Sequence[int], prompt_length: int, lengths: Lengths) -> np.ndarray:
    """Return a response i32[response] cut to the room that its prompt leaves.

    Raises:
      ConfigError: where that is none.
    """
    room = lengths.total - prompt_length
    if room < 1:
        raise ConfigError(
            f"train.max_length: got {lengths.total}, but a prompt has {prompt_length} tokens, "
            "which leaves none for its response; raise it, or lower sampling.max_prompt_length"
        )
    return _array(ids[:room])


def is_truncated(
    lengths: Lengths, origin: Completion | Sample, ids: Sequence[int], cut: np.ndarray
) -> bool:
    """Say whether a response carries no loss: it is truncated, and those are masked."""
    truncated = origin.finish_reason == FINISH_LENGTH or len(cut) < len(ids)
    return lengths.mask_truncated and truncated


def report_truncated(count: int, rest: int, what: str) -> None:
    """Log how many truncated examples are left out."""
    if count:
        logger.info("%d of %d %s left out: truncated responses", count, count + rest, what)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
