"""Export to the Hugging Face format: a folder that `transformers` loads, written atomically."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from halos_jax import sharding
from halos_jax.models import families, hf, spec
from halos_jax.models.families import ModelError, Tensor
from halos_jax.models.layouts import join_parts
from halos_jax.models.lora import Adapted, take_layer
from halos_jax.models.spec import DecoderConfig

logger = logging.getLogger(__name__)

# Files of a model folder, besides weights and config, that travel with the model.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
)
_COPIED = (*_TOKENIZER_FILES, "generation_config.json")
_TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_model(
    params: dict[str, Any],
    config: DecoderConfig,
    folder: str | Path,
    *,
    source: Path | None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model to `folder` in Hugging Face format; it appears there whole or not at all.

    An older model in `folder` is replaced once the new one is complete. In a run of several
    processes all of them call this, and process 0 writes.

    Args:
      params: of `config`, or of `lora.merge_adapter`, sharded in any way; one tensor at a time is
        brought to the host.
      source: folder that the model came from: its config.json is kept where the weights do not
        contradict it, its tokenizer, chat template and generation config are copied. None: a
        Llama config is made and nothing is copied.
      dtype: of the stored weights ("float32", "bfloat16", "float16"); None: that of the params.
      max_shard_bytes: size at which another weight file is begun.

    Raises:
      ModelError: where `folder` is the source or no model folder, or the source another model.
    """
    folder = Path(folder)
    if source is not None and folder.exists() and folder.resolve() == Path(source).resolve():
        raise ModelError(f"{folder}: is the model that the export starts from; give another folder")
    with replace_folder(folder) as partial:
        write_model(
            params,
            config,
            partial,
            source=source,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )


def write_model(
    params: dict[str, Any],
    config: DecoderConfig,
    folder: Path,
    *,
    source: Path | None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    pad_id: int | None = None,
) -> None:
    """Write the model's files into the existing `folder`; for the rest see `save_model`.

    `pad_id` is the token that batches for a classifier are padded with.
    """
    dtype = dtype or config.params_dtype
    if dtype not in _TYPE_NAMES:
        raise ModelError(f"export dtype: got {dtype!r}, allowed: {', '.join(_TYPE_NAMES)}")
    source_config = hf.read_hf_config(Path(source)) if source is not None else None
    hf_config = families.make_hf_config(config, dtype, source_config)
    if config.num_labels and pad_id is not None:
        hf_config["pad_token_id"] = pad_id  # without one transformers scores no batch
    table = families.list_tensors(config, families.get_family(hf_config))
    plan = _plan_tensors(config, table)
    if jax.process_index() == 0:
        _write_json(folder / "config.json", hf_config)
        if source is not None:
            _copy_files(Path(source), folder)
    _write_tensors(params, table, plan, folder, np.dtype(dtype), max_shard_bytes)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder `<folder>.partial` that takes the place of `folder` at the end.

    Everything is on disk before the renaming. If the body fails, `folder` stays as it was and the
    partial folder is removed. Only process 0 touches the disk; all processes leave together.
    """
    partial, old = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old"))
    if jax.process_index() == 0:
        if old.exists() and not folder.exists():
            old.rename(folder)  # an earlier run was killed between the two renamings
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise ModelError(
                f"{folder}: holds files but no config.json, so it is no model that may be "
                "replaced; give another folder, or empty this one"
            )
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        if jax.process_index() == 0:
            for path in (*partial.rglob("*"), partial):
                _sync(path)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if jax.process_index() == 0:
        if folder.exists():
            logger.warning("%s: replacing the model that stood there", folder)
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    sharding.wait_for_all(f"export {folder}")


def replace_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a Hugging Face tokenizer, chat template included, in place of that in `folder`.

    For a model that was trained with another tokenizer or template than those of its source; to
    be called on process 0, inside `replace_folder`.
    """
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            file.unlink()
    tokenizer.save_pretrained(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


# --------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class _Planned:
    """One tensor of the export, and the paths of our arrays that are in it."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]  # (), (layer,) or (layer, expert)
    paths: tuple[str, ...]


def _plan_tensors(config: DecoderConfig, table: dict[str, Tensor]) -> list[_Planned]:
    """List the tensors in the order in which a forward pass needs them."""
    shapes = spec.list_shapes(config)
    inner = [path for path in shapes if path.startswith("layers/")]
    outer = [path for path in shapes if path not in inner]
    layers = [(path, (layer,)) for layer in range(config.num_layers) for path in inner]
    planned = {}
    for path, above in [(outer[0], ()), *layers, *((path, ()) for path in outer[1:])]:
        tensor, shape = table[path], shapes[path]
        for below in np.ndindex(shape[len(above) : tensor.num_stacked]):
            index = (*above, *below)
            name = tensor.name_at(index)
            others = planned[name].paths if name in planned else ()
            own = tensor.shape_of(shape[len(index) :])
            planned[name] = _Planned(name, own, index, (*others, path))
    return list(planned.values())


def _write_tensors(
    params: dict[str, Any],
    table: dict[str, Tensor],
    plan: list[_Planned],
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Write the planned tensors as one safetensors file, or as several and their index."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shards = _split_shards(plan, dtype.itemsize, max_shard_bytes)
    weight_map, writes = {}, jax.process_index() == 0
    # The tensors of a layer's experts come one after the other: they are fetched once.
    fetch_experts = functools.lru_cache(1)(
        lambda path, layer: fetch_array(flat[path], layer, dtype)
    )

    def fetch(path: str, index: tuple[int, ...]) -> np.ndarray:
        if len(index) > 1:
            return fetch_experts(path, index[0])[index[1:]]
        return fetch_array(flat[path], index[0] if index else None, dtype)

    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {planned.name: name for planned in shard}
        with open(folder / name, "wb") if writes else contextlib.nullcontext() as file:
            if file is not None:
                _write_header(file, shard, dtype)
            for planned in shard:
                parts = [(table[path], fetch(path, planned.index)) for path in planned.paths]
                if file is not None:
                    theirs = np.ascontiguousarray(join_parts(parts))
                    file.write(theirs.reshape(-1).view(np.uint8).data)
    if writes and len(shards) > 1:
        total = sum(_num_bytes(entry, dtype.itemsize) for entry in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _num_bytes(entry: _Planned, itemsize: int) -> int:
    return math.prod(entry.shape) * itemsize


def _split_shards(
    plan: list[_Planned], itemsize: int, max_shard_bytes: int
) -> list[list[_Planned]]:
    """Split the plan, in order, into shards of at most `max_shard_bytes` (or of one tensor)."""
    shards, size = [[]], 0
    for entry in plan:
        size += _num_bytes(entry, itemsize)
        if shards[-1] and size > max_shard_bytes:
            shards.append([])
            size = _num_bytes(entry, itemsize)
        shards[-1].append(entry)
    return shards


def _write_header(file: BinaryIO, shard: list[_Planned], dtype: np.dtype) -> None:
    """Write the safetensors header: its length as u64, then JSON padded to eight bytes.

    `safetensors.numpy.save_file` would need all tensors of the file in memory at once; with the
    header first they can follow one by one.
    """
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for entry in shard:
        stop = start + _num_bytes(entry, dtype.itemsize)
        header[entry.name] = {
            "dtype": _TYPE_NAMES[dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def fetch_array(leaf: jax.Array | Adapted, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Bring one array, or one layer of it, to the host as `dtype`; collective over processes.

    An adapter that `lora.merge_adapter` left to be added is added here.
    """
    # A copy even where there is nothing to convert: an array keeps the host value that it was
    # asked for, and the params would hold theirs as long as they live.
    part = _copy(leaf, dtype) if layer is None else _take_layer(leaf, layer, dtype)
    if not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


@functools.partial(jax.jit, static_argnames="dtype")
def _take_layer(leaf: jax.Array | Adapted, layer: int, dtype: np.dtype) -> jax.Array:
    return take_layer(leaf, layer, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _copy(leaf: jax.Array, dtype: np.dtype) -> jax.Array:
    return jnp.array(leaf, dtype, copy=True)
