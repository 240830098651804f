"""`data.holdout`: a fixed part of the prompts of `data.train` that no policy is trained on.

The prompts are those whose conversations have the smallest hashes, whatever the seed and the order,
and all records of a conversation go together. If a file grows from n to m conversations, about
N (m - n) / m of the N prompts held out for a new run are others; a resumed run keeps its own.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from halos_jax.config import ConfigError
from halos_jax.data.records.formats import digest, make_prompt_id
from halos_jax.types import Prompt

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


def split_prompts(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on and those of the `count` conversations held out, in order.

    Raises:
      ConfigError: if none would be left to train on.
    """
    held = choose_held([make_key(prompt) for prompt in prompts], count)
    return (
        take_part(prompts, make_key, held, is_held=False),
        take_part(prompts, make_key, held, is_held=True),
    )


def make_key(prompt: Prompt) -> str:
    """Return the hash of a prompt's conversation by which it is held out, whatever its id.

    A plain text has no turns before it; its id is a hash of the text.
    """
    return digest("holdout", make_prompt_id(prompt.turns) if prompt.turns else prompt.prompt_id)


def choose_held(keys: Iterable[str], count: int) -> frozenset[str]:
    """Return the `count` smallest of the distinct `keys`.

    Raises:
      ConfigError: unless there are more than `count`.
    """
    distinct = sorted(set(keys))
    if count >= len(distinct):
        raise ConfigError(
            f"data.holdout: got {count}, but data.train has {len(distinct)} distinct prompts; "
            "allowed: fewer than it has, since the others are trained on; lower it, or add prompts"
        )
    return frozenset(distinct[:count])


def take_part(
    items: Iterable[_Item],
    key_of: Callable[[_Item], str],
    held: Collection[str],
    *,
    is_held: bool,
) -> list[_Item]:
    """Return the items whose key is among `held`, or those whose key is not."""
    return [item for item in items if (key_of(item) in held) == is_held]
