"""JSON of somebody else's making, read strictly: what is ambiguous or cannot be written is refused.

The parser of the standard library takes the last of two equal keys, passes halves of characters on
that no file can hold, and dies of deep nesting far from where it was given.
"""

import json
import re
from typing import Any

MAX_DEPTH = 64  # of lists and objects in one another; files of models and records have below 10

# The escape of one half of a pair: only then can a text hold a half without the other.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; numbers may be NaN or infinite, as Python writes them.

    Raises:
      ValueError: where it is no JSON, is nested too deeply, has a key twice in one object with
        different values, holds half of a surrogate pair, or a number of thousands of digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # UnicodeDecodeError is a ValueError
    try:
        value = json.loads(text, object_pairs_hook=_make_object)
    except RecursionError:
        raise ValueError(f"lists or objects nested deeper than {MAX_DEPTH}") from None
    _check_values(value, halves=bool(_HALF.search(text)) or not is_unicode(text))
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            # By their text: NaN is no different from NaN, but 1 is from True.
            if repr(made[key]) != repr(value):
                raise ValueError(f"the key {key!r} stands twice in one object, with two values")
    return made


def _check_values(value: Any, *, halves: bool) -> None:
    """Check the depth and, where there may be `halves` of characters, all strings; level by level,
    without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        for one in level if halves else ():
            if isinstance(one, str) and not is_unicode(one):
                raise ValueError(f"half of a surrogate pair in {one[:40]!r}, which is no character")
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
        keys = [key for one in level if isinstance(one, dict) for key in one] if halves else []
        level = keys + [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    raise ValueError(f"lists or objects nested deeper than {MAX_DEPTH}")


def is_unicode(text: str) -> bool:
    """Say whether a text has no half of a surrogate pair, which no tokenizer or file can take."""
    try:
        text.encode()  # many times as fast as a look at each character
    except UnicodeEncodeError:
        return False
    return True
