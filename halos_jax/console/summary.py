"""The summary of a run: a label and what it stands for, a line each."""

import textwrap
from collections.abc import Sequence

from halos_jax.console.values import find_text_width

Fact = tuple[str, str]  # label and text; without a text it is left out


def format_facts(title: str, facts: Sequence[Fact], *, width: int | None = None) -> str:
    """Return a title and a line a fact, wrapped behind the label; a line break in a text stays.

    Args:
      width: columns; None: those of the terminal, at most 100.

    >>> print(format_facts("a run", [("mesh", "data=1"), ("reward", "none")]))
    a run
      mesh    data=1
      reward  none
    """
    shown = [(label, text) for label, text in facts if text]
    width = width or find_text_width()
    room = max((len(label) for label, _ in shown), default=0)
    lines = [title]
    for label, text in shown:
        for number, line in enumerate(text.splitlines()):
            lines += textwrap.wrap(
                line,
                width,
                initial_indent=f"  {'' if number else label:{room}}  ",
                subsequent_indent=" " * (room + 4),
                break_long_words=False,  # a path is to be copied
                break_on_hyphens=False,
            )
    return "\n".join(lines)
