"""Demonstrations as items: the tokens of a whole conversation, of which the answers are targets."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from halos_jax.data.chat import Renderer
from halos_jax.data.tokenize import Lengths, cut_response, is_truncated, report_truncated
from halos_jax.types import FINISH_STOP, TARGET, Completion, Demonstration, Item, Turn


@dataclasses.dataclass
class _Sequence:
    """A sequence under construction: `ids` are a prompt of `start` tokens, answers and what stands
    between them; `turns` are those that it shows so far."""

    turns: tuple[Turn, ...]
    start: int
    ids: tuple[int, ...]
    spans: list[tuple[int, int]]  # of the answers


def make_target_items(
    demonstrations: Iterable[Demonstration], renderer: Renderer, lengths: Lengths
) -> list[Item]:
    """Return the items (target) of demonstrations: one each, for conversations sometimes more.

    A conversation is one sequence in which every answer stands behind exactly the tokens that the
    model would be prompted with. An answer for which that cannot be (the template shows past turns
    otherwise than it generates them, say without their thoughts; or `lengths.total` would cut it)
    starts another sequence, with the turns before it as the prompt.

    Raises:
      ConfigError: where a prompt leaves no room for a response.
    """
    items, truncated = [], 0
    for demonstration in demonstrations:
        completion = demonstration.completion
        sequences = list(_render(demonstration, renderer, lengths))
        for number, sequence in enumerate(sequences):
            is_last = number + 1 == len(sequences)
            # Only the last answer can have been cut by a sampler.
            origin = completion if is_last else Completion(completion.turns)
            item = _make_item(sequence, origin, lengths)
            truncated += item is None
            items += [item] if item else []
    report_truncated(truncated, len(items), "demonstrations")
    return items


def _render(
    demonstration: Demonstration, renderer: Renderer, lengths: Lengths
) -> Iterator[_Sequence]:
    """Yield the sequences of a demonstration."""
    prompt, completion = demonstration.prompt.turns, demonstration.completion
    if completion.ids:
        ids = demonstration.prompt_ids or renderer.render_prompt(prompt, lengths.prompt)
        yield _start(prompt, ids, completion.ids)
        return
    answers = [i for i, turn in enumerate(completion.turns) if turn.role == "assistant"]
    current, shown = None, 0
    for index in answers:
        answer = completion.turns[index]
        finished = index != answers[-1] or completion.finish_reason == FINISH_STOP
        response = renderer.render_response(answer.content, finished=finished)
        if current is not None:
            turns = current.turns + completion.turns[shown:index]
            if _extend(current, turns, response, renderer, lengths):
                shown = index
                continue
            yield current
        turns = prompt + completion.turns[:index]
        if index != answers[-1]:  # what follows must show the same turns
            turns = renderer.truncate_turns(turns, lengths.prompt)
        current = _start(turns, renderer.render_prompt(turns, lengths.prompt), response)
        shown = index
    yield current


def _start(turns: tuple[Turn, ...], ids: Sequence[int], response: Sequence[int]) -> _Sequence:
    end = len(ids) + len(response)
    return _Sequence(turns, len(ids), (*ids, *response), [(len(ids), end)])


def _extend(
    current: _Sequence,
    turns: tuple[Turn, ...],
    response: Sequence[int],
    renderer: Renderer,
    lengths: Lengths,
) -> bool:
    """Add the answer to `turns` to a sequence, and say so, if it goes on as a prompt would."""
    if len(current.ids) + len(response) > lengths.total:
        return False
    prompt = renderer.render_prompt(turns, sys.maxsize)
    end = len(prompt) + len(response)
    if end > lengths.total or prompt[: len(current.ids)] != current.ids:
        return False
    current.turns, current.ids = turns, (*prompt, *response)
    current.spans.append((len(prompt), end))
    return True


def _make_item(sequence: _Sequence, origin: Completion, lengths: Lengths) -> Item | None:
    """Return a sequence as an item, None where its only answer is truncated and masked."""
    start, spans = sequence.start, list(sequence.spans)
    ids = sequence.ids[start:]
    response = cut_response(ids, start, lengths)
    if is_truncated(lengths, origin, ids, response):
        spans.pop()
    if not spans:
        return None
    mask = np.zeros(len(response), bool)
    for first, end in spans:
        mask[first - start : end - start] = True
    masks = () if mask.all() else (mask,)
    prompt = np.asarray(sequence.ids[:start], np.int32)
    return Item(prompt, (response,), (TARGET,), masks=masks)
