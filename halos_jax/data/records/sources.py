"""Where records come from: files, folders, glob patterns, tables, and data sets of the hub."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence

from halos_jax.data.records.csv_files import read_csv
from halos_jax.data.records.edits import change_record
from halos_jax.data.records.fields import NO_EDITS, Edits, Fields, RecordError
from halos_jax.data.records.hub import HUB_SETS, find_named, load_set, read_named
from halos_jax.data.records.reading import OnBad, raise_error, read_records
from halos_jax.data.records.tables import (
    is_saved,
    read_arrow,
    read_parquet,
    read_rows,
    read_saved,
)
from halos_jax.json_text import JsonObject

logger = logging.getLogger(__name__)

_ALLOWED = (
    "a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow; .gz, .zst, .xz or .bz2 of text), a "
    "folder of such files, a pattern ('DIR/*.jsonl'), a saved data set or a folder as 'DIR@split', "
    "a hub data set as 'name@split' or 'name:config@split'; several of them with commas between"
)
_SUFFIX = re.compile(
    r"\.(?:(jsonl?|ndjson|csv|tsv)(?:\.(?:gz|zst|xz|bz2))?|(parquet|arrow|feather))$", re.IGNORECASE
)
# Files in the folder of a data set that hold no records.
_NO_RECORDS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_SPLITS = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for name in names
}

Numbered = Iterator[tuple[int, JsonObject]]


def read_sources(
    source: str, split: str = "", edits: Edits = NO_EDITS, *, on_bad: OnBad = raise_error
) -> Iterator[Fields]:
    """Yield the records of a source.

    Args:
      source: a file, a folder, or a pattern; a data set of `hub.HUB_SETS` as "name@split"; any
        other data set of the hub as "id@split" or "id:config@split", if its records have a shape
        that files may have; or several of these, separated by commas.
      split: yield only records whose field `split` has this value; "" yields all.
      edits: what the config changes in the records. The number that `data.map` leaves out is
        logged.
      on_bad: called with the error of a bad record; if it returns, the record is left out.

    Raises:
      RecordError: if a source cannot be read, or has no such record.
    """
    for name in split_sources(source):
        count = left_out = 0
        for fields in _read_source(name, edits, on_bad):
            try:
                if split and fields.text("split") != split:
                    continue
                count += 1
                changed = change_record(fields)
            except RecordError as error:
                on_bad(error)
                continue
            left_out += changed is None
            if changed is not None:
                yield changed
        if left_out:
            logger.info("%s: data.map leaves out %d of %d records", name, left_out, count)
        if not count:
            wanted = f"record whose field 'split' is {split!r}" if split else "record"
            raise RecordError(f"{name}: got no {wanted}, allowed: at least one; check the source")


def find_benchmarks(source: str) -> list[str]:
    """Return the data sets of a source that are benchmarks, which nobody should train on."""
    names = [name.rpartition("@")[0] for name in split_sources(source)]
    return [name for name in names if name in HUB_SETS and HUB_SETS[name].is_benchmark]


def split_sources(source: str) -> list[str]:
    """Split the text of a field into its sources, which commas separate."""
    if os.path.exists(source):  # a file name may have a comma in it
        return [source]
    return [name.strip() for name in source.split(",") if name.strip()]


def is_named(source: str) -> bool:
    """Return whether a source is a data set with a reader of its own (`hub.HUB_SETS`)."""
    return find_named(source) is not None


def find_folder(source: str) -> str:
    """Return the local folder of a source, without a split; "" if the source is no folder."""
    folder = source if os.path.isdir(source) else source.rpartition("@")[0]
    return folder if os.path.isdir(folder) else ""


def may_read(folder: str, name: str) -> bool:
    """Return whether a file, by its name inside a folder, may be read as records."""
    return _is_records(name) or _is_listed(folder)


def is_taken(source: str, name: str) -> bool:
    """Return whether a file belongs to a source by its name alone, with no list that names it."""
    folder = find_folder(source)
    split = "" if folder == source else source.rpartition("@")[2]
    is_split = not split or _name_split(name) == _SPLITS.get(split, split)
    return _is_records(name) and is_split and not _is_listed(folder)


def _read_source(source: str, edits: Edits, on_bad: OnBad) -> Iterator[Fields]:
    files = _list_files(source)
    if files is None:
        for number, record in _open_set(source):
            yield Fields(record, source, number, edits, unit="row")
        return
    for file in files:
        kind = _find_kind(file)
        texts = kind in ("csv", "tsv")
        for number, record in _open_file(file, kind, on_bad):
            yield Fields(
                record, file, number, edits, texts, unit="line" if texts or not kind else "row"
            )


def _open_file(file: str, kind: str, on_bad: OnBad) -> Numbered:
    if kind in ("csv", "tsv"):
        return read_csv(file, on_bad=on_bad)
    if kind == "parquet":
        return read_parquet(file)
    if kind in ("arrow", "feather"):
        return read_arrow(file)
    return read_records(file, on_bad=on_bad)


def _find_kind(file: str) -> str:
    """Return the format of a file, from its first bytes or else its name; "" means JSON."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(6)
    except OSError:
        return ""  # the reader will report it
    if start[:4] == b"PAR1":
        return "parquet"
    if start == b"ARROW1":
        return "arrow"
    found = _SUFFIX.search(file)
    kind = (found[1] or found[2]).lower() if found else ""
    return "" if kind in ("json", "jsonl", "ndjson") else kind


# --------------------------------------------------------------------------- files and folders


def _list_files(source: str) -> list[str] | None:
    """Return the files of a source, or None if it is a data set that `datasets` reads.

    Raises:
      RecordError: if there are none.
    """
    if os.path.isdir(source):
        return None if is_saved(source) else _list_folder(source)
    if os.path.exists(source):
        return [source]
    folder, _, split = source.rpartition("@")
    if os.path.isdir(folder) and not is_saved(folder) and not _is_described(folder):
        return _list_folder(folder, _SPLITS.get(split, split)) or None
    if glob.has_magic(source) and "@" not in source:
        found = [name for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        if not found:
            raise RecordError(f"{source}: no file matches this pattern; check the path")
        _check_twins(source, found)
        _log_files(source, found)
        return found
    return None


def _list_folder(folder: str, split: str = "") -> list[str]:
    """Return the files of records in a folder and in the folders below it, sorted by name.

    Raises:
      RecordError: if there are none, or if there are files of several splits and none is chosen.
    """
    names = sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, files in _walk(folder)
        for name in files
    )
    others = [name for name in names if not _is_records(name)]
    names = [name for name in names if _is_records(name)]
    splits = {name: _name_split(name) for name in names}
    found = sorted({one for one in splits.values() if one})
    if split:
        names = [name for name in names if splits[name] == split]
    elif len(found) > 1:
        shown = ", ".join(f"{folder}@{one}" for one in found)
        raise RecordError(
            f"{folder}: got a folder with files of the splits {', '.join(found)}, allowed: "
            f"{shown}, or a pattern ('{folder}/*.jsonl')"
        )
    if not names and not split:
        raise RecordError(f"{folder}: got a folder without a file of records, allowed: {_ALLOWED}")
    if names:
        _check_twins(folder, names)
        _log_files(f"{folder}@{split}" if split else folder, names, others)
    return [os.path.join(folder, name) for name in names]


def _check_twins(source: str, names: list[str]) -> None:
    """Refuse a file beside its compressed copy; warn of what may be one file in two formats.

    Raises:
      RecordError: for a compressed copy, since its records would be read twice.
    """
    texts: dict[str, str] = {}
    stems: dict[str, str] = {}
    for name in names:
        known = _SUFFIX.search(name)
        if not known:  # a pattern may match any name
            continue
        stem = name[: known.start()]
        text = f"{stem}.{(known[1] or known[2]).lower()}"
        if text in texts:
            raise RecordError(
                f"{source}: got {texts[text]!r} and {name!r}, which are one file with and "
                "without compression; allowed: one of them; move the other away, or name the files"
            )
        if stem in stems:
            logger.warning(
                "%s: %r and %r differ in their format alone; both are read, and records in both "
                "count twice: name one of them (or a pattern) if they hold the same records",
                source,
                stems[stem],
                name,
            )
        texts[text] = stems[stem] = name


def _is_listed(folder: str) -> bool:
    """Return whether a folder itself lists the files to read, as saved data sets do."""
    return is_saved(folder) or _is_described(folder)


def _is_records(name: str) -> bool:
    is_hidden = any(part[0] in "._" for part in name.split(os.sep))
    known = _SUFFIX.search(name) and os.path.basename(name) not in _NO_RECORDS
    return bool(known) and not is_hidden


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and all below it, each with its files; follow links, but not in circles."""
    above = {folder: {os.path.realpath(folder)}}  # folder -> the folders that it lies in
    for parent, folders, files in os.walk(folder, followlinks=True):
        yield parent, files
        around = above.pop(parent)
        for path in [os.path.join(parent, name) for name in folders]:
            real = os.path.realpath(path)
            if real in around:
                folders.remove(os.path.basename(path))
            else:
                above[path] = around | {real}


def _is_described(folder: str) -> bool:
    """Return whether a folder has a README that lists its files, as hub data sets may."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as stream:
            return "data_files:" in stream.read()
    except (OSError, UnicodeDecodeError):
        return False


def _name_split(name: str) -> str:
    """Return the split in the name of a file or of its folder; "" if neither names one."""
    folder, base = os.path.split(name.lower())
    for word in re.split(r"[^a-z]+", f"{base} {folder}"):
        if word in _SPLITS:
            return _SPLITS[word]
    return ""


def _log_files(source: str, files: list[str], others: Sequence[str] = ()) -> None:
    """Log which files are read, and which others in the folder are not."""
    logger.info("%s: %d files: %s", source, len(files), _show_names(files))
    if others:
        logger.info("%s: %d other files are not read: %s", source, len(others), _show_names(others))


def _show_names(files: Sequence[str]) -> str:
    shown = ", ".join(os.path.basename(name) for name in files[:5])
    return f"{shown} and {len(files) - 5} more" if len(files) > 5 else shown


# --------------------------------------------------------------------------- data sets


def list_set_files(source: str) -> list[str]:
    """Return the files in which `datasets` caches a data set of the hub; [] for other sources.

    Another revision has other files, whose content is the same if its records are.

    Raises:
      RecordError: if there is no such data set.
    """
    if os.path.exists(source) or find_folder(source) or not _is_set(source):
        return []
    return [file["filename"] for file in load_set(source, _ALLOWED).cache_files]


def _open_set(source: str) -> Numbered:
    if os.path.isdir(source):
        return read_saved(source, "")
    name, _, split = source.rpartition("@")
    hub_set = find_named(source)
    if hub_set is None and name and split and os.path.isdir(name) and is_saved(name):
        return read_saved(name, split)
    if not _is_set(source):
        raise RecordError(f"{source}: no such file; allowed: {_ALLOWED}")
    rows = load_set(source, _ALLOWED)
    return read_rows(rows) if hub_set is None else read_named(source, hub_set, rows)


def _is_set(source: str) -> bool:
    """Return whether a source looks like the name of a data set, or is one known here."""
    name, _, split = source.rpartition("@")
    is_other = bool(name and split) and not _SUFFIX.search(source)
    return is_other or find_named(source) is not None
