"""Thoughts before an answer: how a prompt opens one, and how an answer continues it."""

import dataclasses
import re

# A tag -> what ends what it begins.
_TAGS = (
    (r"<(?!/|\|)([^<>|\s]+)>", r"</\1>"),
    (r"\[(?!/)([^\[\]\s]+)\]", r"[/\1]"),
    (r"<\|(START|BEGIN)_([A-Z_]+)\|>", r"<|END_\2|>"),
    (r"<\|(start|begin)_of_(\w+)\|>", r"<|end_of_\2|>"),
)


@dataclasses.dataclass(frozen=True)
class Thought:
    """The text at the end of a prompt that past turns do not have, and the thought it opens.

    Attributes:
      opening: that text, "" where there is none: "<think>\\n", say, or an empty thought.
      begin_tag: what begins a thought; "" where the opening is no thought.
      end_tag: what ends one.
      end: what ends a thought of no words and begins the answer; "" where the opening has it.
    """

    opening: str = ""
    begin_tag: str = ""
    end_tag: str = ""
    end: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """The texts that are markers in an answer, too."""
        return tuple(tag for tag in (self.begin_tag, self.end_tag) if tag)

    @property
    def is_closed(self) -> bool:
        """Whether the opening has ended its thought already."""
        return bool(self.end_tag) and not self.end


def find_thought(opening: str, written_end: str = "") -> Thought:
    """Return the thought that `opening`, the end of a prompt, begins.

    Args:
      written_end: what the template writes between reasoning and content where it shows the former.
    """
    for pattern, closing in _TAGS:
        found = re.search(pattern, opening)
        if found is None:
            continue
        begin, end = found[0], found.expand(closing)
        if end in opening:
            return Thought(opening, begin, end)
        if written_end and end in written_end:
            return Thought(opening, begin, end, written_end)
        return Thought(
            opening, begin, end, ("" if opening.endswith("\n") else "\n") + f"\n{end}\n\n"
        )
    return Thought(opening)


def has_thought(text: str, thought: Thought) -> bool:
    """Tell whether an answer says more between tags than white space."""
    inside, found, _ = text.partition(thought.end_tag)
    return bool(found and inside.replace(thought.begin_tag, "").strip())


def continue_thought(text: str, thought: Thought) -> str:
    """Return an answer's text as it goes on behind the opening.

    What the opening has stands once. Of an answer that only ends a thought the beginning is taken
    to be the prompt's, as it is where a model has generated it. One without a thought ends the
    opened one first.
    """
    bare, rest = thought.opening.strip(), text.lstrip()
    if not bare:
        return text
    if rest.startswith(bare):
        space = thought.opening[len(thought.opening.rstrip()) :]
        rest = rest.removeprefix(bare)
        # Of the white space behind the opening, the prompt has its own.
        return rest.removeprefix(space) if space else rest
    if thought.end and thought.end_tag not in text:
        return thought.end + text
    return text
