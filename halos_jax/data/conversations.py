"""Demonstrations as items: the tokens of a whole conversation, with its answers as targets."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import Lengths, cut_prompt, fit_response, is_truncated
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.reading import OnBad, raise_error
from halos_jax.data.texts import Ids, Texts
from halos_jax.data.tokenize import make_each
from halos_jax.types import TARGET, Completion, Demonstration, Item, Turn


@dataclasses.dataclass
class _Sequence:
    """A sequence under construction: `ids` are a prompt of `start` tokens, the answers and the
    tokens between them; `turns` are the turns in it so far."""

    turns: tuple[Turn, ...]
    start: int
    ids: tuple[int, ...]
    spans: list[tuple[int, int]]  # of the answers


def make_target_items(
    demonstrations: Iterable[Demonstration],
    renderer: Renderer,
    lengths: Lengths,
    *,
    on_bad: OnBad = raise_error,
) -> list[Item]:
    """Return the items (target) of demonstrations: one each, or several for some conversations.

    A conversation is one sequence in which every answer follows exactly the tokens that the model
    would be prompted with. Where that is not possible, an answer starts another sequence, with the
    turns before it as the prompt: if the template shows past turns differently (without their
    thoughts, for example), or if `lengths.total` would cut the answer.

    In a plain text (no prompt), all tokens are targets except the first, which nothing predicts.

    Raises:
      RecordError: if a text has no two tokens, unless `on_bad` leaves it out.
      ConfigError: if a prompt leaves no room for a response, unless `on_bad` leaves it out.
    """
    demonstrations = list(demonstrations)
    talks = [one for one in demonstrations if one.prompt.turns]
    texts = Texts(
        renderer,
        (one.prompt.turns for one in talks if not one.prompt_ids),
        (answer for one in talks for answer in _list_answers(one.completion).values()),
        lengths,
    )
    plain = [one.completion.turns[0].content for one in demonstrations if not one.prompt.turns]
    plain_ids = renderer.render_texts(plain) if plain else iter(())

    def make(demonstration: Demonstration) -> Iterator[Item | None]:
        completion, place = demonstration.completion, demonstration.prompt.place
        if demonstration.prompt.turns:
            sequences = list(_render(demonstration, renderer, texts, lengths))
        else:
            sequences = [_start_text(next(plain_ids), place)]
        for number, sequence in enumerate(sequences):
            is_last = number + 1 == len(sequences)
            # Only the last answer can have been cut by a sampler.
            origin = completion if is_last else Completion(completion.turns)
            yield _make_item(sequence, origin, lengths, place)

    return make_each(demonstrations, make, "demonstrations", on_bad)


def _render(
    demonstration: Demonstration, renderer: Renderer, texts: Texts, lengths: Lengths
) -> Iterator[_Sequence]:
    """Yield the sequences of a demonstration."""
    asked, completion = demonstration.prompt, demonstration.completion
    prompt = asked.turns
    answers = _list_answers(completion)
    if len(answers) == 1:
        ids: Ids = demonstration.prompt_ids or texts.prompt(asked)
        yield _start(prompt, ids, texts.response(completion))
        return
    current: _Sequence | None = None
    shown, last = 0, max(answers)
    for index, answer in answers.items():
        response = texts.response(answer)
        if current is not None:
            turns = current.turns + completion.turns[shown:index]
            if _extend(current, turns, response, renderer, lengths):
                shown = index
                continue
            yield current
        turns = prompt + completion.turns[:index]
        whole = renderer.render_prompt(turns, sys.maxsize)
        if index:
            ids = cut_prompt(renderer, turns, whole, lengths, asked.place)
        else:
            ids = texts.prompt(asked)
        if len(ids) < len(whole) and index != last:  # later prompts must show the same turns
            turns = renderer.truncate_turns(turns, lengths.prompt)
        current = _start(turns, ids, response)
        shown = index
    if current is not None:  # there is always an answer
        yield current


def _list_answers(completion: Completion) -> dict[int, Completion]:
    """Return the answers that are learned, each as a completion, by the index of the turn."""
    if len(completion.turns) == 1:
        return {0: completion}
    numbers = [
        i for i, turn in enumerate(completion.turns) if turn.role == "assistant" and turn.learned
    ]
    answers = {i: Completion((completion.turns[i],)) for i in numbers}
    # Only the last one can have been cut.
    answers[numbers[-1]] = dataclasses.replace(
        answers[numbers[-1]], finish_reason=completion.finish_reason
    )
    return answers


def _start(turns: tuple[Turn, ...], ids: Ids, response: Ids) -> _Sequence:
    end = len(ids) + len(response)
    return _Sequence(turns, len(ids), (*ids, *response), [(len(ids), end)])


def _start_text(ids: tuple[int, ...], place: str) -> _Sequence:
    if len(ids) < 2:
        raise RecordError(f"{place}: field 'text': got {len(ids)} tokens, allowed: two or more")
    return _Sequence((), 1, ids, [(1, len(ids))])


def _extend(
    current: _Sequence,
    turns: tuple[Turn, ...],
    response: Ids,
    renderer: Renderer,
    lengths: Lengths,
) -> bool:
    """Add the answer to `turns` if their prompt continues the sequence; tell whether it did."""
    if len(current.ids) + len(response) > lengths.total:
        return False
    prompt = renderer.render_prompt(turns, sys.maxsize)
    end = len(prompt) + len(response)
    if end > lengths.total or prompt[: len(current.ids)] != current.ids:
        return False
    current.turns, current.ids = turns, (*prompt, *response)
    current.spans.append((len(prompt), end))
    return True


def _make_item(
    sequence: _Sequence, origin: Completion, lengths: Lengths, place: str
) -> Item | None:
    """Return a sequence as an item, or None if its only answer is truncated and masked."""
    start, spans = sequence.start, list(sequence.spans)
    ids = sequence.ids[start:]
    response = fit_response(ids, start, lengths, place)
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
