"""Files of JSON records, plain or compressed: one pass, in order, each record with its line."""

import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.data.records.json_door import JsonFault, parse_json
from halos_jax.errors import UserError
from halos_jax.json_text import JsonObject

Record = JsonObject
OnBad = Callable[[UserError], None]

_SPACE = re.compile(r"[ \t\r\n]*")
_ONE_OBJECT = "one JSON object a line, or one array of objects"
# The errors that reading broken compressed data raises.
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def raise_error(error: UserError) -> None:
    """Raise the error of a bad record: the default of `on_bad`."""
    raise error


def read_records(
    path: str | os.PathLike[str], *, allow_empty: bool = False, on_bad: OnBad = raise_error
) -> Iterator[tuple[int, Record]]:
    """Yield (line number, record) of a JSON or JSON Lines file, plain or compressed.

    The format and the compression (gzip, zstd, xz, bzip2) are told by the content, not by the name.
    Line numbers count from 1; a record in an array has the line on which it starts.

    Args:
      on_bad: called with the error of a record that is not a JSON object; if it returns, the
        record is left out.

    Raises:
      RecordError: if the file is missing, unreadable or broken, or has no records (unless
        `allow_empty`).
    """
    file, count = os.fspath(path), 0
    try:
        with open_file(file) as stream:
            for number, record in _parse(file, stream, on_bad):
                count += 1
                yield number, record
    except FileNotFoundError as error:
        raise RecordError(f"{file}: no such file; check the path") from error
    except BROKEN as error:
        raise RecordError(
            f"{file}: broken compressed data after {count} records: {error}"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise RecordError(f"{file}: cannot be read after {count} records: {reason}") from error
    if not count and not allow_empty:
        raise RecordError(f"{file}: got no records, allowed: {_ONE_OBJECT}")


@contextlib.contextmanager
def open_file(file: str) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, decompressing it if it is compressed.

    Raises:
      RecordError: if it is a zip archive or text in UTF-16.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(file, "rb"))
        start = raw.peek(6)[:6]
        if start[:4] == b"PK\x03\x04":
            raise RecordError(f"{file}: got a zip archive, allowed: the files in it; unpack it")
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise RecordError(
                f"{file}: got text in UTF-16, allowed: UTF-8; convert it (iconv -f UTF-16 -t UTF-8)"
            )
        if start[:2] == b"\x1f\x8b":
            yield cast("BinaryIO", stack.enter_context(gzip.open(raw, "rb")))
        elif start[:4] == b"\x28\xb5\x2f\xfd":
            import pyarrow  # half a second to import, and it has zstd

            packed = stack.enter_context(pyarrow.CompressedInputStream(raw, "zstd"))
            yield stack.enter_context(io.BufferedReader(packed))
        elif start == b"\xfd7zXZ\x00":
            yield cast("BinaryIO", stack.enter_context(lzma.open(raw, "rb")))
        elif start[:3] == b"BZh":
            import bz2

            yield cast("BinaryIO", stack.enter_context(bz2.open(raw, "rb")))
        else:
            yield raw


def _parse(file: str, stream: BinaryIO, on_bad: OnBad) -> Iterator[tuple[int, Record]]:
    first = True
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from _parse_array(file, b"\n" * (number - 1) + line + stream.read(), on_bad)
            return
        first = False
        try:
            record = _load(file, number, line)
        except RecordError as error:
            on_bad(error)
        else:
            yield number, record


def _load(file: str, number: int, line: bytes) -> Record:
    try:
        text = line.decode().strip()
        record, end = parse_json(text)
        if end < len(text):
            raise ValueError(f"text after its end: {shorten(text[end:], 30)}")
        return _require_object(file, number, record)
    except JsonFault as fault:
        raise _name_fault(file, number, fault) from fault
    except RecordError:
        raise
    except ValueError as error:
        got = shorten(line.decode(errors="replace").strip())
        raise RecordError(
            f"{file} line {number}: got {got}, allowed: {_ONE_OBJECT} ({error})"
        ) from error


def _parse_array(file: str, data: bytes, on_bad: OnBad) -> Iterator[tuple[int, Record]]:
    """Yield the elements of one JSON array, each with the line it starts on."""
    number, counted = 1, 0
    try:
        text = data.decode()
        at = _skip_space(text, _skip_space(text, 0) + 1)
        closed = text[at : at + 1] == "]"
        while not closed:
            number, counted = number + text.count("\n", counted, at), at
            try:
                record, at = parse_json(text, at)
                record = _require_object(file, number, record)
            except JsonFault as fault:
                if fault.end is None:
                    raise
                on_bad(_name_fault(file, number, fault))
                at = fault.end
            except RecordError as error:
                on_bad(error)
            else:
                yield number, record
            at = _skip_space(text, at)
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
            at = at if closed else _skip_space(text, at + 1)
        at = _skip_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("text after the array", text, at)
    except JsonFault as fault:
        raise _name_fault(file, number, fault) from fault
    except RecordError:
        raise
    except ValueError as error:
        line = getattr(error, "lineno", number)
        raise RecordError(f"{file} line {line}: broken JSON array: {error}") from error


def _skip_space(text: str, at: int) -> int:
    """Return the index after any white space that begins at `at`."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _require_object(file: str, number: int, record: object) -> Record:
    if not isinstance(record, dict):
        raise RecordError(f"{file} line {number}: got {shorten(record)}, allowed: {_ONE_OBJECT}")
    return record


def _name_fault(file: str, number: int, fault: JsonFault) -> RecordError:
    field = f"field {fault.field!r}: " if fault.field else ""
    return RecordError(
        f"{file} line {number}: {field}got {shorten(fault.got)}, allowed: {fault.allowed}"
    )
