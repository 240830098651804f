"""Where records come from: files, hub data sets, and the hub data sets that have a name here."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from halos_jax.data.fields import Fields, RecordError
from halos_jax.data.hub import HUB_SETS, HubSet
from halos_jax.data.records import read_records

logger = logging.getLogger(__name__)

_ALLOWED = (
    "a .json or .jsonl file (or .gz of it), or a hub data set as 'name@split' or "
    "'name:config@split'; several of them with commas between"
)


def read_sources(source: str, split: str = "") -> Iterator[Fields]:
    """Yield the records of a source.

    Args:
      source: a file (.json, .jsonl, gzip of either); a data set of `hub.HUB_SETS` as "name@split";
        any other of the hub, whose records are as in files, as "id@split" or "id:config@split"; or
        several of these, separated by commas.
      split: yield only records whose field `split` has this value; "" yields all.

    Raises:
      RecordError: where a source cannot be read, or has no such record.
    """
    for name in _split_names(source):
        count = 0
        for number, record in _open_source(name):
            fields = Fields(record, name, number)
            if not split or fields.text("split") == split:
                count += 1
                yield fields
        if not count:
            wanted = f"record whose field 'split' is {split!r}" if split else "record"
            raise RecordError(f"{name}: got no {wanted}, allowed: at least one; check the source")


def find_benchmarks(source: str) -> list[str]:
    """Return those data sets of a source that are there to measure with and not to train on."""
    names = [name.rpartition("@")[0] for name in _split_names(source)]
    return [name for name in names if name in HUB_SETS and HUB_SETS[name].is_benchmark]


def _split_names(source: str) -> list[str]:
    if os.path.exists(source):  # a file name may have a comma in it
        return [source]
    return [name.strip() for name in source.split(",") if name.strip()]


def _open_source(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    name, _, split = source.rpartition("@")
    if os.path.exists(source):
        return read_records(source)
    if name in HUB_SETS or (not name and source in HUB_SETS):
        return _read_named(source, HUB_SETS[name or source], split if name else "")
    if name and split and not source.endswith((".json", ".jsonl", ".gz")):
        path, _, config = name.partition(":")
        return _read_hub(source, {"path": path, "name": config or None, "split": split})
    raise RecordError(f"{source}: no such file; allowed: {_ALLOWED}")


def _read_named(source: str, hub_set: HubSet, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, record) of a data set by its own reader; log how many rows it leaves out."""
    if split not in hub_set.splits:
        allowed = ", ".join(f"'{hub_set.name}@{name}'" for name in hub_set.splits)
        raise RecordError(f"{source}: got split {split!r}, allowed: {allowed}")
    arguments = {**hub_set.arguments, "split": hub_set.splits[split]}
    rows = (row for _, row in _read_hub(source, arguments))
    count = left_out = 0
    try:
        for record in hub_set.read(rows, split):
            count += record is not None
            left_out += record is None
            if record is not None:
                yield count, record
    except (LookupError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{source}: its rows are not as {hub_set.read.__name__} expects them ({error!r}); the "
            "data set has changed, or its copy is another one"
        ) from error
    if left_out:
        logger.info("%s: %d records, %d rows left out", source, count, left_out)


def _read_hub(source: str, arguments: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets  # Seconds to import, and only hub data sets need it.
    except ImportError as error:
        raise RecordError(
            f"{source}: hub data sets need the package 'datasets'; install it"
        ) from error
    try:
        rows = datasets.load_dataset(**arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise RecordError(
            f"{source}: cannot load the data set: {reason}; allowed: {_ALLOWED}"
        ) from error
    yield from enumerate(rows, start=1)
