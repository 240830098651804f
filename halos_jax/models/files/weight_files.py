"""Weight files: safetensors, alone or as shards with an index, opened after a strict check.

The header of a file is read here first, as its format says: what it holds is known by name, type,
shape and place before the library maps it.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from halos_jax.json_text import JsonObject, parse_json
from halos_jax.models.hf.families import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Name in the checkpoint -> its (lazily read) tensor.
Tensors = JsonObject

FLOATS = ("BF16", "F16", "F32", "F64")  # types that weights may have
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as a file's header has it; `start` and `stop` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(file: Path) -> Any:
    """Return what a JSON file of a model's folder holds; ModelError where that cannot be told."""
    try:
        return parse_json(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{file}: missing; a model folder in Hugging Face format has one"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}; copy it again") from error


def has_weights(folder: Path) -> bool:
    """Tell whether the folder has what `open_tensors` opens."""
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> Tensors:
    """Open the folder's weight files; tensors are read when they are sliced.

    Raises:
      ModelError: naming the file that is missing, damaged, or not as the index says.
    """
    tensors: Tensors = {}
    file_of: dict[str, str] = {}
    for file, promised in _list_files(folder).items():
        opened = open_file(file, stack)
        for name in opened:
            if name in file_of:
                raise ModelError(
                    f"{file}: the tensor {name!r} stands in {file_of[name]} too, allowed: once; "
                    "remove the files of another model, or copy this one again"
                )
            file_of[name] = file.name
        if absent := sorted(promised - opened.keys()):
            raise ModelError(
                f"{folder / INDEX}: says that {absent[0]!r} ({len(absent)} such) is in "
                f"{file.name}, which has no such tensor; copy both again from one model"
            )
        tensors |= opened
    return tensors


def open_file(file: Path, stack: contextlib.ExitStack) -> Tensors:
    """Open one safetensors file after a check of its header; ModelError where it is damaged."""
    try:
        names = read_header(file)
        opened = stack.enter_context(safe_open(file, framework="numpy"))
        return {name: opened.get_slice(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(file, error) from error


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
      ModelError: if there is no such file, or it is not whole.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length:,} bytes does not fit in")
            return _check_header(parse_json(stream.read(length)), size - 8 - length)
    except FileNotFoundError as error:
        raise ModelError(f"{file}: missing; copy it") from error
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelError:
    size = file.stat().st_size if file.is_file() else 0
    return ModelError(
        f"{file}: cannot be read as safetensors (header: {error}); it has {size:,} bytes and is "
        "truncated or damaged: download or copy it again"
    )


def _check_header(header: object, size: int) -> dict[str, Entry]:
    """Return the entries of a header before `size` bytes of data, which they must fill exactly."""
    if not isinstance(header, dict):
        raise ValueError(f"got {type(header).__name__}, allowed: an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("__metadata__: allowed: an object of strings")
    entries = {name: _make_entry(name, fields) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in ordered.items():
        if entry.start != end:
            kind = "overlap those of another tensor" if entry.start < end else "leave a gap before"
            raise ValueError(f"{name}: data_offsets [{entry.start}, {entry.stop}] {kind}")
        end = entry.stop
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, but {size:,} follow it")
    return ordered


def _make_entry(name: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{name}: got {found}, allowed: dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name}: dtype: got {dtype!r}, allowed: {', '.join(_BITS)}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
            raise ValueError(f"{name}: {field}: got {value!r}, allowed: integers of 0 or more")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name}: data_offsets {offsets} do not hold {dtype} of the shape {shape}")
    return Entry(dtype, tuple(shape), *offsets)


def _list_files(folder: Path) -> dict[Path, set[str]]:
    """Return the folder's safetensors files and what the index, if any, says is in each."""
    single = folder / SINGLE
    if (folder / INDEX).exists():
        files = _read_index(folder)
        if single.exists() and single not in files:
            raise ModelError(
                f"{folder}: has both {SINGLE} and {INDEX}, which does not name it; allowed: one of "
                "the two; remove what belongs to another model"
            )
        return files
    if single.exists():
        return {single: set()}
    found = sorted({file.name for file in _find_weights(folder)})
    raise ModelError(
        f"{folder}: no weights; allowed: {SINGLE}, or {INDEX} with the files it names; got "
        f"{', '.join(found) or 'no weight file'}. Other formats are not read: convert them with "
        "save_pretrained(..., safe_serialization=True) of transformers."
    )


def _find_weights(folder: Path) -> Iterator[Path]:
    for pattern in ("*.bin", "*.pt*", "*.safetensors", "*.gguf"):
        yield from folder.glob(pattern)


def _read_index(folder: Path) -> dict[Path, set[str]]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: no 'weight_map'; copy it again")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise ModelError(
                f"{folder / INDEX}: weight_map: {name!r}: got {file!r}, allowed: the name of a "
                ".safetensors file beside it; copy it again"
            )
        files.setdefault(folder / file, set()).add(name)
    for file in files:
        if not file.exists():
            raise ModelError(f"{file}: missing, though {INDEX} names it; copy it")
    return dict(sorted(files.items()))


def _is_plain(file: str) -> bool:
    """Tell whether this is the name of a weight file, and no path out of its folder."""
    return file.endswith(".safetensors") and not set(file) & set("/\\\0") and file.isprintable()
