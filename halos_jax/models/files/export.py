"""Export to the Hugging Face format: a folder that `transformers` loads, written atomically."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from halos_jax.json_text import JsonObject
from halos_jax.models import spec
from halos_jax.models.files import hf
from halos_jax.models.files.folders import replace_folder, write_json
from halos_jax.models.files.weight_files import read_header
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.tensors import Tensor, join_parts
from halos_jax.models.lora import Adapted, take_layer
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import Params

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
_TEMPLATES = "additional_chat_templates"  # a folder of the named ones besides the default
_COPIED = (*_TOKENIZER_FILES, f"{_TEMPLATES}/*.jinja", "generation_config.json")
_TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_model(
    params: Params,
    config: DecoderConfig,
    folder: str | Path,
    *,
    source: Path | None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model to `folder` in Hugging Face format; it appears there whole or not at all.

    An older export in `folder` is replaced once the new one is complete. In a run of several
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
      ModelError: if `folder` is the source or no export of ours, the source another model, or a
        weight not finite.
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
    params: Params,
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
        write_json(folder / "config.json", hf_config)
        if source is not None:
            _copy_files(Path(source), folder)
    _write_tensors(params, table, plan, folder, np.dtype(dtype), max_shard_bytes)


class _Tokenizer(Protocol):
    def save_pretrained(self, save_directory: Path) -> object: ...


def replace_tokenizer(folder: Path, tokenizer: _Tokenizer) -> None:
    """Write a Hugging Face tokenizer, chat template included, in place of that in `folder`.

    For a model that was trained with another tokenizer or template than those of its source; to
    be called on process 0, inside `replace_folder`.
    """
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            file.unlink()
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    tokenizer.save_pretrained(folder)


def find_dtype(folder: Path) -> str:
    """Return the dtype of a model's weights, as transformers finds it; "" if it cannot be exported.

    It is the one that config.json names, or else that of the first tensor.
    """
    for settings in (hf.read_hf_config(folder), hf.read_whole_config(folder)):
        named = settings.get("dtype") or settings.get("torch_dtype")
        if isinstance(named, str):
            return named if named in _TYPE_NAMES else ""
    first = sorted(folder.glob("*.safetensors"))[:1]
    stored = [entry.dtype for file in first for entry in read_header(file).values()]
    return next((name for name, code in _TYPE_NAMES.items() if [code] == stored[:1]), "")


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


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
    planned: dict[str, _Planned] = {}
    above: tuple[int, ...]
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
    params: Params,
    table: dict[str, Tensor],
    plan: list[_Planned],
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Write the planned tensors as one safetensors file, or as several and their index."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shards = _split_shards(plan, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    writes = jax.process_index() == 0
    # The tensors of a layer's experts come one after the other: they are fetched once.
    fetch_experts = functools.lru_cache(1)(
        lambda path, layer: fetch_array(flat[path], layer, dtype, f"{path} of layer {layer}")
    )

    def fetch(path: str, planned: _Planned) -> np.ndarray:
        index = planned.index
        if len(index) > 1:
            expert: np.ndarray = fetch_experts(path, index[0])[index[1:]]
            return expert
        return fetch_array(flat[path], index[0] if index else None, dtype, planned.name)

    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {planned.name: name for planned in shard}
        with open(folder / name, "wb") if writes else contextlib.nullcontext() as file:
            if file is not None:
                _write_header(file, shard, dtype)
            for planned in shard:
                parts = [(table[path], fetch(path, planned)) for path in planned.paths]
                if file is not None:
                    theirs = np.ascontiguousarray(join_parts(parts))
                    file.write(theirs.reshape(-1).view(np.uint8).data)
    if writes and len(shards) > 1:
        total = sum(_num_bytes(entry, dtype.itemsize) for entry in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _num_bytes(entry: _Planned, itemsize: int) -> int:
    return math.prod(entry.shape) * itemsize


def _split_shards(
    plan: list[_Planned], itemsize: int, max_shard_bytes: int
) -> list[list[_Planned]]:
    """Split the plan, in order, into shards of at most `max_shard_bytes` (or of one tensor)."""
    shards: list[list[_Planned]] = [[]]
    size = 0
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
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    start = 0
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


def fetch_array(
    leaf: jax.Array | Adapted, layer: int | None, dtype: np.dtype, name: str
) -> np.ndarray:
    """Bring one array, or one layer of it, to the host as `dtype`; collective over processes.

    An adapter that `lora.merge_adapter` left to be added is added here.

    Raises:
      ModelError: with `name`, where a value is NaN or infinite.
    """
    # A copy even where there is nothing to convert: an array keeps the host value that it was
    # asked for, and the params would hold theirs as long as they live.
    part, finite = _copy(leaf, dtype) if layer is None else _take_layer(leaf, layer, dtype)
    if not finite:
        raise ModelError(
            f"export: {name} has values that are NaN or infinite as {dtype.name}, so the model is "
            "not exported; allowed: finite weights; take an earlier checkpoint with "
            "--config.task=export --config.model.checkpoint=N, or another export.dtype where "
            "float16 is too narrow"
        )
    if not part.is_fully_addressable:
        gathered: np.ndarray = multihost_utils.process_allgather(part, tiled=True)
        return gathered
    return np.asarray(part)


@functools.partial(jax.jit, static_argnames="dtype")
def _take_layer(
    leaf: jax.Array | Adapted, layer: int, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    part = take_layer(leaf, layer, dtype)
    return part, jnp.isfinite(part).all()


@functools.partial(jax.jit, static_argnames="dtype")
def _copy(leaf: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    part = jnp.array(leaf, dtype, copy=True)
    return part, jnp.isfinite(part).all()
