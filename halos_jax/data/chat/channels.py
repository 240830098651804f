"""Answers of several messages, the last of which is meant for the reader.

The template of gpt-oss begins an answer with `<|channel|>final<|message|>`, after the header that a
model is prompted with. A model may first write other messages, such as thoughts and tool calls, in
channels of their own. Its answer is the text after the last such beginning.
"""

from collections.abc import Collection, Sequence


def find_lead(beginning: Sequence[int], special_ids: Collection[int]) -> tuple[int, ...]:
    """Return the ids that show where the content of an answer begins; () where none do.

    Args:
      beginning: the ids that a template writes between the header and the content. Without a
        special token among them they are text like any other: an empty thought, say.
    """
    return tuple(beginning) if set(beginning) & set(special_ids) else ()


def take_content(ids: Sequence[int], lead: Sequence[int]) -> list[int] | None:
    """Return what follows the last `lead` in `ids`; None if `lead` is not in them."""
    ids, lead = list(ids), list(lead)
    for start in range(len(ids) - len(lead), -1, -1):
        if ids[start : start + len(lead)] == lead:
            return ids[start + len(lead) :]
    return None
