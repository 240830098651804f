"""Records in tables: Parquet, Arrow, CSV, and folders that `datasets` saved."""

import csv
import datetime
import decimal
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.reading import BROKEN, OnBad, open_file, raise_error

Rows = Iterator[tuple[int, dict[str, Any]]]


def read_csv(file: str, *, on_bad: OnBad = raise_error) -> Rows:
    """Yield (line, record) of a CSV file with a header, compressed or not.

    A file named .tsv has tabs between its columns. Every value stays the text that it is: nothing
    is guessed of "007" or "NA". A field whose cell is empty is absent.

    Args:
      on_bad: called with the error of a record with too many or too few cells, or with a broken
        quote; if it returns, the record is left out.

    Raises:
      RecordError: if the file is missing, broken or not UTF-8, or if a quote is not closed before
        its end: then nothing tells where the next record begins.
    """
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in os.path.basename(file).lower() else ","
    try:
        with open_file(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as stream:
            lines = _Lines(stream)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(reader, [])
            _check_header(file, names, delimiter)
            is_broken = False
            while True:
                line = lines.start_record()
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    on_bad(_skip_broken(file, lines, error))
                    is_broken = True
                    continue
                if is_broken and not lines.is_quoted_right(cells):
                    # Elsewhere this is text, but here it may be the rest of a broken record.
                    on_bad(_make_error(file, lines, "behind a broken record"))
                    continue
                if not cells:
                    continue
                if len(cells) != len(names):
                    on_bad(
                        RecordError(
                            f"{file} line {line}: got {len(cells)} cells, allowed: {len(names)}, "
                            "as the header has"
                        )
                    )
                    continue
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
    """The lines of a file, with those of the record that is being read."""

    def __init__(self, stream: Iterable[str]):
        self._lines = iter(stream)
        self._record: list[str] = []
        self.first, self.last = 1, 0  # lines of the record

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.last += 1
        self._record.append(line)
        return line

    def start_record(self) -> int:
        """Begin a record with the next line; return its number."""
        self.first, self._record = self.last + 1, []
        return self.first

    def is_quoted_right(self, cells: Sequence[str]) -> bool:
        """Say whether each quote in a cell of the record stands twice, in a cell in quotes."""
        text = "".join(self._record)
        doubled = (cell.replace('"', '""') for cell in cells if '"' in cell)
        return all(f'"{cell}"' in text for cell in doubled)

    def end_record(self) -> bool:
        """Go to the end of a record, a line behind an even number of quotes; say if there is one.

        That is where every record ends whose quotes are right.
        """
        quotes = sum(line.count('"') for line in self._record)
        while quotes % 2:
            line = next(self, None)
            if line is None:
                return False
            quotes += line.count('"')
        return True


def _skip_broken(file: str, lines: _Lines, error: object) -> RecordError:
    """Skip the rest of a record with a broken quote; return its error.

    Raises:
      RecordError: if it has no end.
    """
    if not lines.end_record():
        raise RecordError(
            f"{file} line {lines.first}: a quote is opened here, or in a line below, and not "
            f"closed up to the end of the file ({error}): where the next record begins is not "
            "known, so that data.skip_bad cannot leave it out either; allowed: quotes in pairs, "
            "two of them for one within a quoted cell; mend that line"
        )
    return _make_error(file, lines, error)


def _make_error(file: str, lines: _Lines, reason: object) -> RecordError:
    last = lines.last
    span = f"line {last}" if last == lines.first else f"lines {lines.first} to {last}"
    return RecordError(
        f"{file} {span}: got a quote within a cell ({reason}), allowed: two of them there, which "
        f"mean one, and the cell in quotes; where this is left out, line {last + 1} is taken for "
        "the beginning of the next record"
    )


def read_parquet(file: str) -> Rows:
    """Yield (row, record) of a Parquet file.

    Raises:
      RecordError: if it cannot be read.
    """
    import pyarrow.parquet  # half a second, and only tables need it

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1000)

    yield from _read_batches(file, batches(), "Parquet")


def read_arrow(file: str) -> Rows:
    """Yield (row, record) of an Arrow (Feather) file or stream, as `datasets` writes them.

    Raises:
      RecordError: if it cannot be read.
    """
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        with pyarrow.OSFile(file) as source:
            if source.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                yield from map(table.get_batch, range(table.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    yield from _read_batches(file, batches(), "Arrow")


def _read_batches(file: str, batches: Iterator[Any], what: str) -> Rows:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise RecordError(
                    f"{file}: got the columns {names}, allowed: a different name for each column"
                )
            for row in batch.to_pylist():
                number += 1
                yield number, plain_row(row)
    except RecordError:
        raise
    # Values that Python cannot hold (text that is not UTF-8, the year 200000) are ValueErrors too.
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise RecordError(
            f"{file}: cannot be read as {what} after {number} rows: {reason}"
        ) from error


def is_saved(folder: str) -> bool:
    """Return whether a folder was made by `save_to_disk` of `datasets`."""
    found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return "dataset_dict.json" in found or {"dataset_info.json", "state.json"} <= found


def read_saved(folder: str, split: str) -> Rows:
    """Yield (row, record) of a folder that `save_to_disk` made, of one split if it has several.

    Raises:
      RecordError: if it cannot be read, or has no such split.
    """
    import datasets  # seconds to import

    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise RecordError(f"{folder}: cannot be read as a saved data set: {reason}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            names = ", ".join(f"{folder}@{name}" for name in sorted(found))
            got = f"the split {split!r}" if split else "no split"
            raise RecordError(f"{folder}: got {got}, allowed: {names}")
        found = found[split]
    elif split and split != str(found.split):
        raise RecordError(f"{folder}: got the split {split!r}, allowed: {folder}, which has none")
    # A format saved with the data set would turn values into arrays and hide columns.
    yield from read_rows(found.with_format(None))


def read_rows(rows: Any) -> Rows:
    """Yield (row, record) of a data set of `datasets`."""
    for number, row in enumerate(rows, start=1):
        yield number, plain_row(row)


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table as a record, without its null values.

    All rows of a table have the same fields, even inside lists of objects, so a null means that the
    field is absent. Dates become text. What JSON cannot hold (bytes, images) stays as it is.
    """
    return {name: _plain(value) for name, value in row.items() if value is not None}


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return plain_row(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value
