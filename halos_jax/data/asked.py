"""Prompts that are asked for from Python: of a file, or the texts of a user's turns."""

from collections.abc import Sequence

from halos_jax.data.records import formats
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.types import Prompt, Turn


def read_asked(prompts: Sequence[Prompt | str]) -> list[Prompt]:
    """Return the prompts in their order, each text as the turn of a user.

    Raises:
      RecordError: if there is none, or one is no prompt, blank, or given twice.
    """
    if isinstance(prompts, str):
        raise RecordError("prompts: got a string, allowed: a list of texts and Prompts")
    if not prompts:
        raise RecordError("prompts: got none, allowed: one or more")
    asked = [one if isinstance(one, Prompt) else _make_prompt(one) for one in prompts]
    if len({one.prompt_id for one in asked}) < len(asked):
        raise RecordError("prompts: got one of them twice; allowed: each once, with its own id")
    return asked


def _make_prompt(text: str) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"prompts: got {shorten(text)}, allowed: Prompts, texts with some text")
    turns = (Turn("user", text),)
    return Prompt(formats.make_prompt_id(turns), turns)
