"""Data in a page: compressed, and in base64, so that no text of theirs is ever part of the page.

The 64 characters of base64 cannot end a `<script>` element, begin a tag or be read as a program.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Iterable
from typing import Any

_LEVEL = 6
_DEPTH = 2  # {"prompts": [...]}: a prompt at a time


def squeeze(text: str) -> str:
    """Return a text, compressed and in base64; the same text gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), _LEVEL, mtime=0)).decode()


def squeeze_json(value: Any) -> str:
    """Return a JSON value as `squeeze` does; NaN and infinities are refused.

    The members of its longest parts are written one by one: a thread that writes a page may keep
    the others from Python for as long as one call of the encoder takes.
    """
    return squeeze(_dump_parts(value, _DEPTH))


def dump(value: Any) -> str:
    """Return a JSON value in as few characters as its text needs, all of them ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _dump_parts(value: Any, depth: int) -> str:
    """Return what `dump` does, of members down to a depth one after the other."""
    if depth and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        members = (f"{dump(key)}:{_dump_parts(one, depth - 1)}" for key, one in value.items())
        return f"{{{','.join(members)}}}"
    if depth and isinstance(value, list | tuple):
        return f"[{','.join(_dump_parts(one, depth - 1) for one in value)}]"
    return dump(value)


def take_within(items: Iterable[Any], budget: int) -> tuple[list[Any], int]:
    """Return the first items that fit into so many characters of base64, and how many did not."""
    taken, left, used = list[Any](), 0, 0
    stream = zlib.compressobj(_LEVEL)
    for item in items:
        if not left:
            size = len(stream.compress(dump(item).encode()) + stream.flush(zlib.Z_SYNC_FLUSH))
            used += size * 4 // 3
        if left or used > budget:
            left += 1
        else:
            taken.append(item)
    return taken, left
