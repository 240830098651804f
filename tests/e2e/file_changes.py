"""Files changed at random: one thing in a JSON value, or a few bytes."""

import copy
import json
import math
import struct

STRANGE = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-300, 1e300, math.nan, math.inf, 10**40),
    *("", "x", "16", "../x", "\ud800", [], [1], [None], [[]], {}, {"a": 1}, {"content": "x"}),
]


def find_places(value, path=()):
    """Yield the path of every value inside of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(inner):
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from find_places(one, (*path, key))


def change_value(value, rng):
    """Return a copy of a JSON value with one thing changed."""
    made = copy.deepcopy(value)
    *way, last = rng.choice(list(find_places(made)))
    holder = made
    for key in way:
        holder = holder[key]
    kind = rng.choice(["strange", "strange", "number", "delete", "rename", "nest", "swap", "add"])
    if kind == "delete":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[last + rng.choice("xs")] = holder.pop(last)
    elif kind == "nest":
        for _ in range(rng.choice([1, 3, 80])):
            holder[last] = [holder[last]]
    elif kind == "swap":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    elif kind == "add" and isinstance(holder, dict):
        holder[f"new_{rng.randrange(9)}"] = rng.choice(STRANGE)
    elif kind == "number" and isinstance(holder[last], int | float):
        holder[last] = rng.choice([1, 2, 3, 0.5, -1]) * holder[last] + rng.choice([0, 1, -1])
    else:
        holder[last] = copy.deepcopy(rng.choice(STRANGE))
    return made


def change_bytes(data, rng):
    """Return bytes with a bit, a digit, a piece or the end of them changed."""
    at = rng.randrange(len(data) + 1)
    piece = rng.randrange(1, 9)
    kind = rng.choice(["bit", "digit", "cut", "drop", "double", "insert"])
    if kind == "bit" and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "digit":
        places = [place for place, byte in enumerate(data[:4000]) if 48 <= byte < 58]
        at = rng.choice(places or [0])
        return data[:at] + bytes([rng.randrange(48, 58)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + piece :]
    if kind == "double":
        return data[: at + piece] + data[at:]
    return data[:at] + bytes(rng.randrange(256) for _ in range(piece)) + data[at:]


def change_json(text, rng):
    """Return the bytes of a JSON file with one thing changed, in the value or in the text."""
    if rng.random() < 0.3:
        return change_bytes(text, rng)
    return json.dumps(change_value(json.loads(text), rng)).encode("utf-8", "surrogatepass")


def split_header(data):
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def change_safetensors(data, rng):
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    header, rest = split_header(data)
    made = change_json(header, rng)
    return struct.pack("<Q", len(made)) + made + rest
