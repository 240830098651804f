"""What of a conversation is left where it is longer than its limit."""

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
) -> tuple[Turn, ...]:
    """Return the turns that `measure` finds at most `max_length` long.

    The last turn is the question, so it stays longest. Dropped are, in this order and only as far
    as needed: the oldest exchanges, the system turns (see `drop_oldest`), the beginning of the last
    turn.

    Args:
      measure: the length of turns in tokens, as a prompt.
      find_starts: the characters of a text at which it may be cut, ascending from 0.

    Raises:
      ConfigError: where turns without any content are longer.
    """
    while measure(turns) > max_length:
        fewer = drop_oldest(turns)
        if len(fewer) == len(turns):
            return _cut_left(turns, max_length, len(turns) - 1, measure, find_starts)
        turns = fewer
    return turns


def drop_oldest(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns without the oldest exchange; without a system turn, where no other is left.

    An exchange is a turn and what follows it up to the next user's, so that roles go on
    alternating. The last turn stays, and with what a tool said all from the user's on. The context
    of the conversation (its tools) stays, too. Nothing else to drop: the same turns.
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
) -> tuple[Turn, ...]:
    """Cut the content of the turn `at` at the first place behind which the prompt fits.

    Where nothing of it can stay, the turn before it is cut, and so on.
    """
    content = turns[at].content
    starts = [*find_starts(content), len(content)]

    def cut(index: int) -> tuple[Turn, ...]:
        turn = dataclasses.replace(turns[at], content=content[starts[index] :])
        return (*turns[:at], turn, *turns[at + 1 :])

    low, high = 0, len(starts) - 1
    shortest = measure(cut(high))
    if shortest > max_length and at:
        return _cut_left(cut(high), max_length, at - 1, measure, find_starts)
    if shortest > max_length:
        raise ConfigError(
            f"max_length: got {max_length}, but a prompt without any content has {shortest} "
            f"tokens in this chat template; allowed: {shortest} or more; raise "
            "sampling.max_prompt_length"
        )
    # A shorter text can have more tokens, so this may not find the very longest that fits; what
    # stands at `high` was rendered and does fit.
    while low < high:
        middle = (low + high) // 2
        if measure(cut(middle)) <= max_length:
            high = middle
        else:
            low = middle + 1
    return cut(high)
