"""A strict reader for other people's JSON: it refuses what is ambiguous or cannot be written back.

The standard library's parser takes the last of two equal keys, accepts lone surrogates, which no
UTF-8 file can hold, and hits the recursion limit on deep nesting.
"""

import json
import re
from typing import Any, TypeAlias

# An object of JSON, as it is parsed; whoever reads it checks its values.
JsonObject: TypeAlias = dict[str, Any]

MAX_DEPTH = 64  # of nested lists and objects; files of models and records have less than 10

# The escape of a surrogate: without one, text decoded from UTF-8 cannot hold a lone surrogate.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text; numbers may be NaN or infinite, as Python writes them.

    Raises:
      ValueError: if it is not JSON, is nested too deeply, has a key twice in one object with
        different values, or has a lone surrogate or a number of thousands of digits.
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
            # Compare by repr: NaN equals itself then, and 1 differs from True.
            if repr(made[key]) != repr(value):
                raise ValueError(f"the key {key!r} stands twice in one object, with two values")
    return made


def _check_values(value: Any, *, halves: bool) -> None:
    """Check the depth and, if there may be `halves` of surrogate pairs, all strings.

    It goes level by level, without recursion.
    """
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
    """Tell whether a text has no lone surrogate, which no tokenizer or file accepts."""
    try:
        text.encode()  # many times as fast as testing each character
    except UnicodeEncodeError:
        return False
    return True
