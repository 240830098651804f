"""The token ids of the prompts and answers that came as text, rendered together."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from halos_jax.config import ConfigError
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import Lengths, cut_prompt
from halos_jax.types import FINISH_STOP, Completion, Prompt, Turn

Ids: TypeAlias = Sequence[int] | np.ndarray  # i32[tokens]


def make_array(ids: Ids) -> np.ndarray:
    """Return token ids as i32[tokens]."""
    return np.asarray(ids, np.int32)


class Texts:
    """The ids of prompts and answers that came as text, each distinct one rendered once.

    Feedback repeats texts (25 models against one baseline have each prompt 25 times), and a
    tokenizer is faster on many texts at a time than on one after the other.
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
            one: _try_cut(renderer, one, ids, lengths)
            for one, ids in zip(turns, wholes, strict=True)
        }
        texts = list(dict.fromkeys(_spell(one) for one in completions if not one.ids))
        self._responses = dict(
            zip(texts, map(make_array, renderer.render_responses(texts)), strict=True)
        )

    def prompt(self, prompt: Prompt) -> np.ndarray:
        """Return the ids i32[prompt] of one of the prompts.

        Raises:
          ConfigError: with its place, where no cut makes it short enough.
        """
        found = self._prompts[prompt.turns]
        if isinstance(found, ConfigError):
            raise ConfigError(f"{prompt.place}: {found}" if prompt.place else str(found))
        return found

    def response(self, completion: Completion) -> Ids:
        """Return the ids of one of the completions: its own, if it has them."""
        return completion.ids or self._responses[_spell(completion)]


def _try_cut(
    renderer: Renderer, turns: tuple[Turn, ...], whole: Sequence[int], lengths: Lengths
) -> np.ndarray | ConfigError:
    """Return the ids of a prompt, or the error, which is raised when a record asks for them."""
    try:
        return make_array(cut_prompt(renderer, turns, whole, lengths))
    except ConfigError as error:
        return error


def _spell(completion: Completion) -> tuple[str | Turn, bool]:
    """Return a completion's text (its turn, if that has more), and whether it ended by itself."""
    finished = completion.finish_reason == FINISH_STOP
    if len(completion.turns) == 1 and completion.turns[0].further:
        return completion.turns[0], finished
    return "".join(turn.content for turn in completion.turns), finished
