"""From records to training items: token ids through the one renderer, cut to length."""

import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import (
    Lengths,
    cut_prompt,
    cut_response,
    fit_response,
    is_truncated,
    report_truncated,
)
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
    Turn,
)

logger = logging.getLogger(__name__)


class Texts:
    """The ids of prompts and answers that came as text, each distinct one rendered once.

    Feedback repeats its texts (25 models against one baseline are 25 times the same prompt), and a
    tokenizer takes many at a time faster than one by one.
    """

    def __init__(
        self,
        renderer: Renderer,
        prompts: Iterable[tuple[Turn, ...]],
        completions: Iterable[Completion],
        lengths: Lengths,
    ):
        """Render prompts, cut to `lengths.prompt`, and completions that have no ids."""
        turns = list(dict.fromkeys(prompts))
        wholes = renderer.render_prompts(turns, sys.maxsize)
        self._prompts = {
            one: _array(cut_prompt(renderer, one, ids, lengths))
            for one, ids in zip(turns, wholes, strict=True)
        }
        texts = list(dict.fromkeys(_spell(one) for one in completions if not one.ids))
        self._responses = dict(
            zip(texts, map(_array, renderer.render_responses(texts)), strict=True)
        )

    def prompt(self, turns: tuple[Turn, ...]) -> np.ndarray:
        """Return the ids i32[prompt] of one of the prompts."""
        return self._prompts[turns]

    def response(self, completion: Completion) -> Sequence[int]:
        """Return the ids of one of the completions: its own, if it has them."""
        return completion.ids or self._responses[_spell(completion)]


def _spell(completion: Completion) -> tuple[str | Turn, bool]:
    """Return a completion's text (its turn, where that says more), and if it ended by itself."""
    finished = completion.finish_reason == FINISH_STOP
    if len(completion.turns) == 1 and completion.turns[0].further:
        return completion.turns[0], finished
    return "".join(turn.content for turn in completion.turns), finished


def make_pair_items(
    preferences: Iterable[Preference], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return one item (chosen, rejected) a preference.

    Feedback that carries token ids keeps them as they were sampled; text is rendered.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    items, truncated = [], 0
    preferences = list(preferences)
    texts = Texts(
        renderer,
        (one.prompt.turns for one in preferences if not one.prompt_ids),
        (half for one in preferences for half in (one.chosen, one.rejected)),
        lengths,
    )
    for preference in preferences:
        prompt_ids = preference.prompt_ids or texts.prompt(preference.prompt.turns)
        pair = (preference.chosen, preference.rejected)
        sources = [texts.response(completion) for completion in pair]
        place = preference.prompt.place
        responses = tuple(fit_response(ids, len(prompt_ids), lengths, place) for ids in sources)
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
        shorter = dataclasses.replace(lengths, prompt=lengths.prompt - len(prefix))
        classes[desirable] = Texts(renderer, prompts, completions, shorter)
    items, truncated = [], 0
    for judgement in judgements:
        prefix = prefixes[not judgement.desirable]
        texts = classes[judgement.desirable]
        prompt_ids = (*texts.prompt(judgement.prompt.turns), *prefix)
        ids = texts.response(judgement.completion)
        response = fit_response(ids, len(prompt_ids), lengths, judgement.prompt.place)
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
    texts = Texts(
        renderer,
        (one.prompt.turns for one in judgements if not one.prompt_ids),
        (one.completion for one in judgements),
        lengths,
    )
    prompts = [_array(one.prompt_ids or texts.prompt(one.prompt.turns)) for one in judgements]
    responses = [texts.response(one.completion) for one in judgements]
    numbers: dict[bytes, int] = {}  # prompts are long to compare
    groups = [numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts]
    items, truncated = [], 0
    for number, (judgement, prompt) in enumerate(zip(judgements, prompts, strict=True)):
        own = fit_response(responses[number], len(prompt), lengths, judgement.prompt.place)
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
        items.append(Item(prompt, found, roles, desirable=judgement.desirable))
    report_truncated(truncated, len(items), "answers")
    return items


def make_answer_items(
    judgements: Sequence[Judgement], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return one item (member) a judgement, with reward 1 where it is desirable, else -1.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    texts = Texts(
        renderer,
        (one.prompt.turns for one in judgements if not one.prompt_ids),
        (one.completion for one in judgements),
        lengths,
    )
    items, truncated = [], 0
    for judgement in judgements:
        prompt = judgement.prompt_ids or texts.prompt(judgement.prompt.turns)
        ids = texts.response(judgement.completion)
        response = fit_response(ids, len(prompt), lengths, judgement.prompt.place)
        if is_truncated(lengths, judgement.completion, ids, response):
            truncated += 1
            continue
        rewards = (1.0 if judgement.desirable else -1.0,)
        items.append(
            Item(_array(prompt), (response,), (MEMBER,), rewards, desirable=judgement.desirable)
        )
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
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        if sample.reward is not None:
            # By its tokens too: those of the first sample stand before all of the group.
            groups.setdefault((sample.prompt.key, sample.prompt_ids), []).append(sample)
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
    asked, prompt = group[0].prompt, group[0].prompt_ids
    if not prompt:
        whole = renderer.render_prompt(asked.turns, sys.maxsize)
        prompt = cut_prompt(renderer, asked.turns, whole, lengths)
    sources = [
        one.response_ids
        or renderer.render_response(one.output, finished=one.finish_reason == FINISH_STOP)
        for one in group
    ]
    responses = tuple(fit_response(ids, len(prompt), lengths, asked.place) for ids in sources)
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


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
