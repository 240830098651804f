"""Records in tables: Parquet, Arrow, and folders that `datasets` saved."""

import datetime
import decimal
import os
from collections.abc import Iterator
from typing import Any

from halos_jax.data.records.fields import RecordError
from halos_jax.json_text import JsonObject

Rows = Iterator[tuple[int, JsonObject]]


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


def plain_row(row: JsonObject) -> JsonObject:
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
