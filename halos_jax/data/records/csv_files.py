"""Records of CSV and TSV files, also of files in which some are broken.

Behind a broken quote nothing tells at once whether a line begins a record or goes on with a cell
that has several lines. Such lines are read, but held back until a quote at the beginning of a cell
shows that they are records: within a cell in quotes it would have to stand twice.
"""

import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.reading import BROKEN, OnBad, open_file, raise_error


def read_csv(file: str, *, on_bad: OnBad = raise_error) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of a CSV file with a header, compressed or not.

    A file named .tsv has tabs between its columns. Every value stays the text that it is: nothing
    is guessed of "007" or "NA". A field whose cell is empty is absent.

    Args:
      on_bad: called with the error of a record with too many or too few cells, or with a broken
        quote; if it returns, the record is left out. So are lines behind a broken quote that may be
        a part of its record.

    Raises:
      RecordError: if the file is missing, broken or not UTF-8, or if a quote is not closed before
        its end: then nothing tells where the next record begins.
    """
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in os.path.basename(file).lower() else ","
    opening = re.compile(rf'(?:^|{delimiter})"[^"{delimiter}\r\n]', re.MULTILINE)
    try:
        with open_file(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as stream:
            lines = _Lines(stream)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(reader, [])
            _check_header(file, names, delimiter)
            for line, cells in _read_rows(file, lines, reader, len(names), opening, on_bad):
                yield line, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    except (OSError, *BROKEN, csv.Error, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read as CSV in UTF-8: {error}") from error


def _check_header(file: str, names: list[str], delimiter: str) -> None:
    if not all(names) or len(set(names)) < len(names):
        raise RecordError(
            f"{file} line 1: got the header {names}, allowed: a different name for each column"
        )
    signs = [one for one in ";\t|," if one != delimiter and one in "".join(names)]
    if len(names) == 1 and signs:
        between = "a tab" if delimiter != "," else "commas"
        raise RecordError(
            f"{file} line 1: got one column, {names[0]!r}, allowed: columns with {between} "
            f"between them, not {signs[0]!r}; a file with tabs is named .tsv"
        )


class _Lines:
    """The lines of a file, with those of the record that is being read.

    Attributes:
      first: the number of the record's first line; `last`: of the last line that was read.
      at_end: whether the reader has reached the end of the file.
    """

    def __init__(self, stream: Iterable[str]):
        self._lines = iter(stream)
        self._record: list[str] = []
        self.first, self.last = 1, 0
        self.at_end = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.at_end = True
            raise StopIteration
        self.last += 1
        self._record.append(line)
        return line

    def start_record(self) -> None:
        """Begin a record with the next line."""
        self.first, self._record = self.last + 1, []

    @property
    def text(self) -> str:
        """The record as it stands in the file."""
        return "".join(self._record)

    def is_quoted_right(self, cells: Sequence[str]) -> bool:
        """Return whether each quote in a cell of the record is doubled, in a cell in quotes."""
        doubled = (cell.replace('"', '""') for cell in cells if '"' in cell)
        return all(f'"{cell}"' in self.text for cell in doubled)


def _read_rows(
    file: str,
    lines: _Lines,
    reader: Iterator[list[str]],
    count: int,
    opening: re.Pattern[str],
    on_bad: OnBad,
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of the records with `count` cells.

    Args:
      opening: finds the beginning of a cell in quotes.
    """
    held: list[tuple[int, list[str]]] = []
    is_sure, has_quotes = True, False
    is_quoted = bool(opening.search(lines.text))  # cells of this file stand in quotes

    def leave_held() -> None:
        if held:
            on_bad(_make_doubt(file, held[0][0], lines.first - 1))
            held.clear()

    while (cells := _parse(file, lines, reader, count)) is not None:
        if isinstance(cells, RecordError):
            leave_held()
            on_bad(cells)
            is_sure = is_sure and not is_quoted and '"' not in lines.text
        elif not is_sure and not lines.is_quoted_right(cells):
            leave_held()
            on_bad(_make_doubt(file, lines.first, lines.last))
        elif cells and (is_sure or opening.search(lines.text)):
            yield from held
            held.clear()
            yield lines.first, cells
            is_sure, is_quoted = True, is_quoted or bool(opening.search(lines.text))
        elif cells:
            has_quotes = '"' in lines.text or (has_quotes and bool(held))
            held.append((lines.first, cells))
    if has_quotes:
        leave_held()
    yield from held  # a cell would have to end with a quote


def _parse(
    file: str, lines: _Lines, reader: Iterator[list[str]], count: int
) -> list[str] | RecordError | None:
    """Return the cells of the next record, its error, [] of an empty line, None at the end.

    Raises:
      RecordError: if a quote stays open to the end of the file.
    """
    lines.start_record()
    try:
        cells = next(reader, None)
    except csv.Error as error:
        if lines.at_end:
            raise RecordError(
                f"{file} line {lines.first}: a quote is opened here and not closed up to the end "
                "of the file: where the next record begins is not known, so that data.skip_bad "
                "cannot leave it out either; allowed: quotes in pairs, two of them for one within "
                "a cell in quotes; mend that line, or fetch the file again if it was cut off"
            ) from error
        return RecordError(
            f"{file} {_name_span(lines.first, lines.last)}: got a broken quote ({error}), allowed: "
            "a cell with quotes stands in quotes, and each of its own is doubled"
        )
    if cells and len(cells) != count:
        return RecordError(
            f"{file} line {lines.first}: got {len(cells)} cells, allowed: {count}, as the header "
            "has"
        )
    return cells


def _make_doubt(file: str, first: int, last: int) -> RecordError:
    return RecordError(
        f"{file} {_name_span(first, last)}: may be a part of the broken record before it"
    )


def _name_span(first: int, last: int) -> str:
    return f"line {first}" if last == first else f"lines {first} to {last}"
