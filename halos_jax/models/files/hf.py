"""Import of Hugging Face models: local folder or hub id, safetensors only, streamed to the devices.

Every name and shape is checked before the first weight is read. Then one array after the other
is assembled on the host, device shard by device shard, from memory-mapped files, so that the host
never holds more than one shard of one array.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes  # noqa: F401  (lets numpy hold and convert bfloat16)
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from halos_jax.config import ModelConfig
from halos_jax.json_text import JsonObject
from halos_jax.models import spec
from halos_jax.models.files import mxfp4, vocab
from halos_jax.models.files.text_model import take_text_config, take_text_tensors
from halos_jax.models.files.tied import has_own_head, share_embedding
from halos_jax.models.files.weight_files import (
    FLOATS,
    Tensors,
    has_weights,
    open_tensors,
    read_json,
)
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.positions import find_max_positions
from halos_jax.models.hf.schema import list_unread
from halos_jax.models.hf.tensors import Tensor
from halos_jax.models.spec import DecoderConfig
from halos_jax.once import once_a_run
from halos_jax.types import Params

logger = logging.getLogger(__name__)

# What a model needs of a hub repository; never code, pickles or subfolders with other formats.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_READERS = min(os.cpu_count() or 1, 8)  # tensors that are read, and held, at one time
_HELD_BYTES = 2**32  # that they may have, where this is less: all experts may be one tensor


def resolve_model(path: str) -> Path:
    """Return the local folder of a model: `path` itself, or the download of the hub id `path`.

    Raises:
      ModelError: if `path` is neither.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:  # as no hub id is
        raise ModelError(
            f"model {path!r} not found: there is no such folder; give a folder with config.json "
            "and *.safetensors, or the id of a model on the Hugging Face hub"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model {path!r} not found: there is no such folder, and as an id on the Hugging Face "
            f"hub it failed with {type(error).__name__}: {reason}. Give a folder with config.json "
            "and *.safetensors, or the id of a model that you can download."
        ) from error


def load_decoder_config(path: str, settings: ModelConfig | None = None) -> DecoderConfig:
    """Return the decoder of the model at `path`, to be run as `settings` says."""
    folder = resolve_model(path)
    hf_config = read_hf_config(folder)
    config = families.make_decoder_config(hf_config, settings)
    drawn = settings is not None and settings.random_init
    if config.tie_embeddings and not config.num_labels and not drawn and _has_own_head(folder):
        _warn_once(
            f"{folder}: has a head of its own though config.json ties it to the embedding "
            "(tie_word_embeddings): the head is read, and exported untied"
        )
        config = dataclasses.replace(config, tie_embeddings=False)
    if unread := list_unread(hf_config):
        _warn_once(f"{folder / 'config.json'}: not read here: {', '.join(unread)}")
    return dataclasses.replace(config, max_positions=find_max_positions(hf_config))


@once_a_run
def _warn_once(message: str) -> None:
    logger.warning(message)


def _has_own_head(folder: Path) -> bool:
    if not has_weights(folder):
        return False
    with contextlib.ExitStack() as stack:
        whole = read_whole_config(folder)
        tensors = take_text_tensors(whole, open_tensors(folder, stack))
        return has_own_head(tensors, families.get_family(take_text_config(whole)))


def read_hf_config(folder: Path) -> JsonObject:
    """Return the folder's config.json, of a model of text and images that of the text model.

    Raises:
      ModelError: if it is missing or no JSON object.
    """
    return take_text_config(read_whole_config(folder))


def read_whole_config(folder: Path) -> JsonObject:
    """Return the folder's config.json as it is; raises as `read_hf_config`."""
    read = read_json(folder / "config.json")
    if not isinstance(read, dict):
        raise ModelError(f"{folder / 'config.json'}: got {type(read).__name__}, allowed: an object")
    return read


def load_params(
    path: str, config: DecoderConfig, mesh: Mesh, *, allow_new: Iterable[str] = ()
) -> JsonObject:
    """Load the params of `config` from the model at `path`, in `config.params_dtype`, sharded.

    `allow_new` names arrays that are drawn (always the same) where the checkpoint has none: with
    ("score",) a language model becomes a fresh reward model, and its head is left out.

    Rows that a vocabulary has grown by, and `config.new_rows`, are filled as `models.vocab` says.

    Raises:
      ModelError: with every tensor that is missing, unexpected, or of another shape or type than
        `config` says; or naming the file that cannot be read.
    """
    folder = resolve_model(path)
    whole = read_whole_config(folder)
    hf_config = take_text_config(whole)
    family = families.get_family(hf_config)
    wanted = traverse_util.flatten_dict(spec.abstract_params(config, mesh), sep="/")
    table = families.list_tensors(config, family)
    with contextlib.ExitStack() as stack:
        tensors = take_text_tensors(whole, open_tensors(folder, stack))
        if config.tie_embeddings:
            tensors = share_embedding(tensors, family)
        if hf_config.get("quantization_config"):  # of a kind that the family allows: this one
            tensors = mxfp4.unpack_tensors(tensors)
            logger.info("%s: weights in MXFP4 are read as numbers, and exported as such", folder)
        new = [name for name in allow_new if name in wanted and table[name].name not in tensors]
        stored = {name: leaf for name, leaf in wanted.items() if name not in new}
        # A tied head may be stored all the same, and a fresh classifier has no use for one.
        ignored = {family.tensors["head"].name} if config.tie_embeddings or allow_new else set()
        expected = {
            name: shape
            for path, leaf in stored.items()
            for name, shape in expect_tensors(table[path], leaf.shape)
        }
        rows = {table[path].name for path in vocab.PATHS if path in stored}
        expected |= {
            name: (min(hf_config["vocab_size"], config.vocab_size), config.d_model) for name in rows
        }
        _check_tensors(folder, tensors, expected, ignored, family.buffers)
        tensors |= {name: vocab.add_rows(name, tensors[name], config) for name in rows}
        flat = {name: _load(leaf, table[name], tensors) for name, leaf in stored.items()}
    if new:
        logger.info("%s: drawing %s, which the checkpoint lacks", folder, ", ".join(new))
        flat |= _draw(0, config, mesh, {name: wanted[name] for name in new})
    return _unflatten({name: flat[name] for name in wanted})


def load_or_init_params(
    settings: ModelConfig,
    config: DecoderConfig,
    mesh: Mesh,
    seed: int,
    *,
    allow_new: Iterable[str] = (),
) -> JsonObject:
    """Load the params of `settings.path`, or draw them from `seed` if `settings.random_init`."""
    if not settings.random_init:
        return load_params(settings.path, config, mesh, allow_new=allow_new)
    wanted = traverse_util.flatten_dict(spec.abstract_params(config, mesh), sep="/")
    return _unflatten(_draw(seed, config, mesh, wanted))


def _draw(
    seed: int, config: DecoderConfig, mesh: Mesh, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Draw the arrays `wanted` as `spec.init_params` does, on the devices that are to hold them."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(spec.init_params(key, config), sep="/")
        return {name: flat[name] for name in wanted}

    shardings = {name: leaf.sharding for name, leaf in wanted.items()}
    with jax.set_mesh(mesh):
        drawn: dict[str, jax.Array] = jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    return drawn


def _unflatten(flat: Mapping[str, jax.Array]) -> Params:
    params: Params = traverse_util.unflatten_dict(flat, sep="/")
    return params


# --------------------------------------------------------------------------- checks


def _check_tensors(
    folder: Path,
    tensors: Tensors,
    expected: Mapping[str, tuple[int, ...]],
    ignored: set[str],
    buffers: tuple[str, ...],
) -> None:
    """Raise one ModelError that lists all that is wrong with the names, shapes and types."""
    problems = [("missing", name) for name in sorted(expected.keys() - tensors.keys())]
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in expected:
            # Old checkpoints hold masks and RoPE frequencies, which follow from config.json.
            if name not in ignored and not name.endswith(buffers):
                problems.append(("unexpected", name))
        elif shape != expected[name]:
            detail = f"got shape {shape}, config.json asks for {expected[name]}"
            problems.append((detail, name))
        elif dtype not in FLOATS:
            problems.append((f"got type {dtype}, allowed: {', '.join(FLOATS)}", name))
    if problems:
        raise ModelError(
            f"{folder}: the weights do not fit the model of config.json:\n  "
            + "\n  ".join(summarize(problems))
            + "\nUse weights and a config.json of one and the same model."
        )


def expect_tensors(tensor: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the checkpoint's tensors for an array of ours."""
    stacked = tensor.num_stacked
    for index in np.ndindex(shape[:stacked]):
        yield tensor.name_at(index), tensor.shape_of(shape[stacked:])


def summarize(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line per problem; the same problem in several layers is one line."""
    layers = defaultdict(list)
    for problem, name in problems:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        general = f"{name[: number.start()]}*{name[number.end() :]}" if number else name
        layers[problem, general].append((int(number[0]) if number else 0, name))
    lines = []
    for (problem, general), found in layers.items():
        if len(found) == 1:
            lines.append(f"{found[0][1]}: {problem}")
        else:
            numbers = ", ".join(str(number) for number, _ in sorted(found))
            lines.append(f"{general}: {problem} (layers {numbers})")
    return lines


# --------------------------------------------------------------------------- reading


def _load(leaf: jax.ShapeDtypeStruct, tensor: Tensor, tensors: Tensors) -> jax.Array:
    """Read one array onto its devices; a block that several devices hold is read once."""
    devices_of = defaultdict(list)
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, leaf.shape))
        devices_of[bounds].append(device)
    placed = []
    for bounds, devices in devices_of.items():
        block = _read_block(leaf, bounds, tensor, tensors)
        placed += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(placed)  # else the host holds blocks that wait for their transfer
        del block
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)


def _read_block(
    leaf: jax.ShapeDtypeStruct,
    bounds: tuple[tuple[int, int], ...],
    tensor: Tensor,
    tensors: Tensors,
) -> np.ndarray:
    """Read `leaf[bounds]` in the leaf's dtype, one tensor of the checkpoint after the other."""
    block = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    index = tuple(slice(*bound) for bound in bounds)
    stacked = tensor.num_stacked
    shape, first = leaf.shape[stacked:], [start for start, _ in bounds[:stacked]]

    def read(place: tuple[int, ...]) -> None:
        at = tuple(start + step for start, step in zip(first, place, strict=True))
        stored = tensors[tensor.name_at(at)]
        _copy(block[place], tensor.read(shape, index[stacked:], stored.__getitem__))

    # What is fused with another array is read with it.
    largest = 2 * math.prod(block.shape[stacked:]) * block.itemsize
    readers = max(1, min(_READERS, _HELD_BYTES // largest))
    # Transposing is what takes the time, and numpy does it without Python's lock.
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, np.ndindex(block.shape[:stacked])))
    return block


def _copy(out: np.ndarray, values: np.ndarray, tile: int = 256) -> None:
    """Copy and convert `values`, whose axes may be transposed in memory, into `out`."""
    if out.dtype == values.dtype:  # bytes will do; numpy holds its lock for a type that it lacks
        plain = f"u{out.itemsize}"
        out, values = out.view(plain), values.view(plain)
    if out.ndim == 1:
        out[...] = values
        return
    # Tile by tile: a transposed copy as a whole misses the cache at nearly every element.
    for row in range(0, out.shape[0], tile):
        for column in range(0, out.shape[-1], tile):
            cut = (slice(row, row + tile), ..., slice(column, column + tile))
            out[cut] = values[cut]
