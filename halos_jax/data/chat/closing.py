"""Answers with all that a chat template writes after them: classifiers read their score there."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from halos_jax.data.chat.renderer import Renderer
from halos_jax.types import Item


def close_items(items: Sequence[Item], renderer: Renderer, max_length: int) -> list[Item]:
    """Return the items with the end of the template after every answer that has ended.

    Other programs render a conversation with its template and read the score at its end. An answer
    that was cut, by its sampler or by `max_length`, stays as it is.

    Args:
      max_length: the most tokens of prompt and response together.
    """
    if len(renderer.end_ids) < 2:  # the template writes nothing after the marker
        return list(items)
    marker, *rest = renderer.end_ids
    closing = np.asarray(rest, np.int32)

    def close(response: np.ndarray, room: int) -> np.ndarray:
        ended = len(response) > 0 and response[-1] == marker
        fits = len(response) + len(closing) <= room
        return np.concatenate([response, closing]) if ended and fits else response

    return [
        dataclasses.replace(
            item,
            responses=tuple(
                close(response, max_length - len(item.prompt_ids)) for response in item.responses
            ),
        )
        for item in items
    ]
