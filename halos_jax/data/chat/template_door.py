"""Records that the chat template refuses, or shows in part only; found with file and line."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.records.edits import join_turns
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.turns import (
    CONTEXT,
    REASONING,
    find_context,
    speaks_of,
    strip_context,
    unpack,
)
from halos_jax.types import Demonstration, Judgement, Preference, Prompt, Sample, Turn

logger = logging.getLogger(__name__)

_Record = TypeVar("_Record", Prompt, Sample, Demonstration, Preference, Judgement)
_Made = TypeVar("_Made")
# Keys that change the meaning of a conversation.
_NEEDED = (*CONTEXT, *REASONING, "tool_calls")


def keep_shown(
    records: Sequence[_Record], renderer: Renderer, *, skip: bool = False, count: int = 0
) -> list[_Record]:
    """Return the records whose conversations the chat template shows whole.

    Args:
      skip: leave out the other records and log their number.
      count: stop checking once this many are found, and keep the rest unchecked; 0: check all.

    Raises:
      RecordError: for the first other record, with file and line, unless `skip`; or if all are
        left out.
    """
    kept: list[_Record] = []
    errors: list[RecordError] = []
    for number, record in enumerate(records):
        if count and len(kept) >= count:
            kept += records[number:]
            break
        error = _find_refusal(record, renderer, skip=skip)
        if error is None:
            kept.append(record)
        elif skip:
            errors.append(error)
        else:
            raise error
    if errors:
        logger.warning(
            "%d of %d records are left out (data.skip_bad), since the chat template refuses them; "
            "the first: %s",
            len(errors),
            len(errors) + len(kept),
            errors[0],
        )
    if records and not kept:
        raise RecordError(f"the chat template refuses all of the records; the first: {errors[0]}")
    return kept


def make_shown(
    make: Callable[[list[_Record]], _Made],
    records: list[_Record],
    renderer: Renderer,
    *,
    skip: bool = False,
) -> _Made:
    """Return `make(records)`, which renders the records.

    Raises:
      RecordError: for the first record that the chat template refuses, with file and line, unless
        `skip`.
    """
    if skip:
        return make(keep_shown(records, renderer, skip=True))
    for record in records:
        _check_keys(record, renderer)
    try:
        return make(records)
    except RecordError:
        keep_shown(records, renderer)  # finds the record with the error
        raise


def _find_refusal(record: object, renderer: Renderer, *, skip: bool) -> RecordError | None:
    """Return why the template does not show a record, with its place and the ways on, or None."""
    try:
        _check_keys(record, renderer)
        for turns in _list_prompts(record):
            try:
                renderer.show(turns)
            except RecordError as error:
                raise RecordError(f"{error}{_name_ways(turns, renderer, skip=skip)}") from error
        for answer in _list_answers(record):
            if answer.further:
                renderer.render_response(answer)
    except RecordError as error:
        place = _find_prompt(record).place
        known = not place or str(error).startswith(place)
        return error if known else RecordError(f"{place}: {error}")
    return None


def _name_ways(turns: tuple[Turn, ...], renderer: Renderer, *, skip: bool) -> str:
    """Return what a user may set where the template refuses turns, as the end of a message."""
    ways = [] if skip else ["data.skip_bad=true leaves such records out"]
    with contextlib.suppress(RecordError, ValueError):
        joined = join_turns(turns)
        if joined != turns:
            renderer.show(joined)
            joins = "data.merge_turns=true joins system turns and neighbours of one role"
            ways.insert(0, f"{joins}, which it takes")
    return f"; {'; '.join(ways)}" if ways else ""


def _find_prompt(record: Any) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt


def _check_keys(record: object, renderer: Renderer) -> None:
    """Raise RecordError if a turn has a key that the template does not mention, or if the tools or
    documents of a conversation change nothing in its prompt."""
    prompt = _find_prompt(record)
    answers = record.completion.turns if isinstance(record, Demonstration) else ()
    missing = ""
    for turn in (*prompt.turns, *answers):
        for name in unpack(turn) if turn.further else ():
            if name in _NEEDED and not speaks_of(renderer.template, name):
                missing = missing or name
    context = list(find_context(prompt.turns))
    if not missing and context:
        shown = renderer.show(prompt.turns) != renderer.show(strip_context(prompt.turns))
        missing = "" if shown else context[0]
    if missing:
        raise RecordError(
            f"{prompt.place}: {missing!r}: the chat template does not show it; allowed: a template "
            f"that does (model.chat_template), or data.ignore_fields={missing} to go without"
        )


def _list_prompts(record: object) -> Iterator[tuple[Turn, ...]]:
    """Yield the prompts of a record: its own, and those before later answers to learn."""
    prompt = _find_prompt(record).turns
    turns = record.completion.turns if isinstance(record, Demonstration) else ()
    if not prompt:  # a plain text
        return
    yield prompt
    for index, turn in enumerate(turns):
        if index and turn.role == "assistant" and turn.learned:
            yield (*prompt, *turns[:index])


def _list_answers(record: object) -> Iterable[Turn]:
    if isinstance(record, Preference):
        return (*record.chosen.turns, *record.rejected.turns)
    if isinstance(record, (Demonstration, Judgement)):
        return [turn for turn in record.completion.turns if turn.role == "assistant"]
    return ()
