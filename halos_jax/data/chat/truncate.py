"""Cutting a conversation that is longer than its limit."""

import dataclasses
from collections.abc import Callable, Sequence

from halos_jax.config import ConfigError
from halos_jax.data.records.turns import TOOLS, add_context, find_context
from halos_jax.types import Turn


def truncate_turns(
    turns: tuple[Turn, ...],
    max_length: int,
    *,
    measure: Callable[[Sequence[Turn]], int],
    find_starts: Callable[[str], list[int]],
    template: str = "this chat template",
) -> tuple[Turn, ...]:
    """Shorten turns until `measure` gives at most `max_length`.

    The last turn is the question, so it is kept longest. First the oldest exchanges are dropped,
    then the system turns (see `drop_oldest`), then the beginning of the last turn; no more than
    needed.

    Args:
      measure: gives the length in tokens of turns as a prompt.
      find_starts: gives the indices of a text at which it may be cut, ascending from 0.
      template: what an error calls the chat template.

    Raises:
      ConfigError: if even turns without any content are longer.
    """
    while measure(turns) > max_length:
        fewer = drop_oldest(turns)
        if len(fewer) == len(turns):
            return _cut_left(turns, max_length, len(turns) - 1, measure, find_starts, template)
        turns = fewer
    return turns


def drop_oldest(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns without the oldest exchange or, if there is none, without a system turn.

    An exchange is a turn and all that follow it up to the next user turn, so that roles still
    alternate. The last turn is kept; if it is a tool's, so are those before it back to the user's.
    The context of the conversation (its tools) is kept too. If nothing can be dropped, the turns
    are returned as they are.
    """
    question = len(turns) - 1
    if turns[-1].role in TOOLS:
        while question and turns[question].role in (*TOOLS, "assistant"):
            question -= 1
    first = next((i for i in range(question) if turns[i].role != "system"), None)
    if first is not None:
        end = first + 1
        while end < question and turns[end].role not in ("user", "system"):
            end += 1
    elif question:
        first, end = 0, 1
    else:
        return turns
    kept = turns[:first] + turns[end:]
    lost = find_context(turns[first:end])
    return add_context(kept, lost | find_context(kept)) if lost else kept


def _cut_left(
    turns: tuple[Turn, ...],
    max_length: int,
    at: int,
    measure: Callable[[Sequence[Turn]], int],
    find_starts: Callable[[str], list[int]],
    template: str,
) -> tuple[Turn, ...]:
    """Cut the beginning of the turn `at`, as little as makes the prompt fit.

    If the prompt does not fit even without its whole content, cut the turn before it too.
    """
    content = turns[at].content
    starts = [*find_starts(content), len(content)]

    def cut(index: int) -> tuple[Turn, ...]:
        turn = dataclasses.replace(turns[at], content=content[starts[index] :])
        return (*turns[:at], turn, *turns[at + 1 :])

    low, high = 0, len(starts) - 1
    shortest = measure(cut(high))
    if shortest > max_length and at:
        return _cut_left(cut(high), max_length, at - 1, measure, find_starts, template)
    if shortest > max_length:
        raise ConfigError(
            f"max_length: got {max_length}, but a prompt without any content has {shortest} "
            f"tokens in {template}; allowed: {shortest} or more; raise "
            "sampling.max_prompt_length (reward.max_length of a reward model)"
        )
    # A shorter text can have more tokens, so this may miss the longest text that fits; the text at
    # `high` was rendered and does fit.
    while low < high:
        middle = (low + high) // 2
        if measure(cut(middle)) <= max_length:
            high = middle
        else:
            low = middle + 1
    return cut(high)
