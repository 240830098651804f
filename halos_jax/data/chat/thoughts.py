"""Thoughts before an answer: how a prompt opens one, and how an answer continues it."""

import dataclasses
import re

# The pattern of a tag that begins a thought, and the tag that ends it.
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
      opening: that text, such as "<think>\\n" or an empty thought; "" if there is none.
      begin_tag: the tag that begins a thought; "" if the opening has no thought.
      end_tag: the tag that ends one.
      end: the text that ends an empty thought and begins the answer; "" if the opening has it.
    """

    opening: str = ""
    begin_tag: str = ""
    end_tag: str = ""
    end: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags, which are markers in an answer as well."""
        return tuple(tag for tag in (self.begin_tag, self.end_tag) if tag)

    @property
    def is_closed(self) -> bool:
        """Whether the opening has ended its thought already."""
        return bool(self.end_tag) and not self.end


def find_thought(opening: str, written_end: str = "") -> Thought:
    """Return the thought that begins in `opening`, the end of a prompt.

    Args:
      written_end: the text that the template writes between reasoning and content; "" if it shows
        no reasoning.
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
    """Return whether an answer has more than white space between the tags of a thought."""
    inside, found, _ = text.partition(thought.end_tag)
    return bool(found and inside.replace(thought.begin_tag, "").strip())


def continue_thought(text: str, thought: Thought) -> str:
    """Return an answer's text as it continues the opening.

    The opening is not repeated. An answer that ends a thought without beginning one is taken to
    continue the prompt's, as an answer that a model generates does. An answer without a thought is
    put after the end of the prompt's.
    """
    bare, rest = thought.opening.strip(), text.lstrip()
    if not bare:
        return text
    if rest.startswith(bare):
        space = thought.opening[len(thought.opening.rstrip()) :]
        rest = rest.removeprefix(bare)
        # The prompt has the white space after the opening already.
        return rest.removeprefix(space) if space else rest
    if thought.end and thought.end_tag not in text:
        return thought.end + text
    return text
