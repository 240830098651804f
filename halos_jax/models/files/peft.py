"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors.numpy import save

from halos_jax.json_text import JsonObject
from halos_jax.models import lora
from halos_jax.models.files import export, hf
from halos_jax.models.files.adapter_schema import list_faults
from halos_jax.models.files.text_model import INSIDE, find_composite, take_text_config
from halos_jax.models.files.weight_files import (
    FLOATS,
    Tensors,
    open_file,
    read_header,
    read_json,
)
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import Family
from halos_jax.models.hf.tensors import Tensor, join_parts
from halos_jax.models.lora import Adapter, Frozen, Module
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT wraps the model twice.
_PREFIX = "base_model.model."


def read_adapter(
    path: str, config: DecoderConfig, family: Family, *, dropout: float, seed: int
) -> Adapter:
    """Return what the adapter at `path` (a folder or hub id) is: rank, alpha and modules.

    Raises:
      ModelError: if it is no LoRA adapter for `config`, or of a kind that is not supported.
    """
    folder = hf.resolve_model(path)
    settings = read_json(folder / CONFIG)
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / CONFIG}: got {type(settings).__name__}, allowed: an object")
    wrong = list(list_faults(settings))
    if wrong:
        raise ModelError(
            f"{folder / CONFIG}: an adapter that halos_jax cannot run:\n  "
            + "\n  ".join(wrong)
            + "\nUse a plain LoRA adapter, or merge this one into its base with peft."
        )
    names = _read_shapes(folder).keys()
    modules = tuple(
        module
        for module in lora.find_modules(config, family)
        if any(f".{module.name}.lora_" in name for name in names)
    )
    if not modules:
        raise ModelError(
            f"{folder / WEIGHTS}: got {', '.join(list(names)[:3]) or 'no tensors'}, allowed: an "
            "adapter of linear layers of this model's blocks; use one that was trained on it"
        )
    return Adapter(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        modules=modules,
        dropout=dropout,
        rslora=bool(settings.get("use_rslora")),
        seed=seed,
    )


def load_adapter(
    path: str, frozen: Frozen, config: DecoderConfig, family: Family, mesh: Mesh
) -> JsonObject:
    """Load the adapter at `path`, which `read_adapter` has read, in the params' dtype, sharded.

    Where it has no score head and the model has one, that is the base's.

    Raises:
      ModelError: with every tensor that is missing, unexpected or of another shape.
    """
    folder = hf.resolve_model(path)
    wanted = lora.abstract_trained(config, mesh, frozen.adapter)
    wanted = traverse_util.flatten_dict(wanted, sep="/")
    found = _read_shapes(folder)
    inside = any(name.startswith(_PREFIX + INSIDE) for name in found)
    table = list_tensors(frozen.adapter, config, family, inside=inside)
    if "score" in wanted and table["score"].name not in found:
        del wanted["score"]
    expected = {
        name: shape
        for key, leaf in wanted.items()
        for name, shape in hf.expect_tensors(table[key], leaf.shape)
    }
    problems = [("missing", name) for name in sorted(expected.keys() - found.keys())]
    for name, shape in found.items():
        if name not in expected:
            problems.append(("unexpected", name))
        elif shape != expected[name]:
            problems.append((f"got shape {shape}, allowed: {expected[name]}", name))
    if problems:
        raise ModelError(
            f"{folder}: the adapter does not fit the model:\n  "
            + "\n  ".join(hf.summarize(problems))
            + "\nUse an adapter of linear layers that was trained on this very model."
        )
    with contextlib.ExitStack() as stack:
        tensors = open_file(folder / WEIGHTS, stack)
        flat = {key: _load(leaf, table[key], tensors) for key, leaf in wanted.items()}
    loaded: Params = traverse_util.unflatten_dict(flat, sep="/")
    return lora.take_whole(frozen.base, config) | loaded


def write_adapter(
    params: Params, frozen: Frozen, config: DecoderConfig, folder: Path, *, base: str
) -> None:
    """Write the adapter `params` of `frozen` into the new folder `folder`.

    Every process calls this, and process 0 writes. `base` is the base's path, which PEFT loads.

    Raises:
      ModelError: if a weight is not finite.
    """
    whole = hf.read_whole_config(hf.resolve_model(base))
    family, inside = families.get_family(take_text_config(whole)), find_composite(whole) is not None
    table = list_tensors(frozen.adapter, config, family, inside=inside)
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: dict[str, list[tuple[Tensor, np.ndarray]]] = {}
    for key, tensor in table.items():
        layers = range(config.num_layers) if key.startswith("layers/") else (None,)
        for layer in layers:
            name = tensor.name.format(layer=layer)
            array = export.fetch_array(flat[key], layer, flat[key].dtype, name)
            parts.setdefault(name, []).append((tensor, array))
    if jax.process_index() != 0:
        return
    folder.mkdir()
    tensors = {name: np.ascontiguousarray(join_parts(found)) for name, found in parts.items()}
    # Not by `save_file`: its file is the owner's alone, whatever the umask.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    settings = _make_settings(frozen.adapter, config, family, base)
    if inside:  # the images' part has modules of the same names
        settings["target_modules"] = _match_inside(frozen.adapter)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def list_tensors(
    adapter: Adapter, config: DecoderConfig, family: Family, *, inside: bool = False
) -> dict[str, Tensor]:
    """Return, for each array that is trained, where PEFT's file has it.

    `lora_A` is [R, in] and `lora_B` [out, R]: the weight's own layout, with R on one of its sides.
    `inside` says that the base is the text model in a model of text and images.
    """
    weights = families.list_tensors(config, family)
    if inside:
        weights = {
            path: dataclasses.replace(tensor, name=re.sub(r"^model\.", INSIDE, tensor.name))
            for path, tensor in weights.items()
        }
    table = {}
    for module in adapter.modules:
        for path in module.paths:
            tensor = weights[f"layers/{path}"]
            name = _PREFIX + tensor.name.removesuffix("weight")
            outputs, inputs = tensor.axes
            count = len(inputs)
            table[f"layers/{module.a_name}"] = Tensor(
                f"{name}lora_A.weight", ((count,), tuple(range(count)))
            )
            table[f"layers/{path}_lora_b"] = dataclasses.replace(
                tensor,
                name=f"{name}lora_B.weight",
                axes=(tuple(axis - count + 1 for axis in outputs), (0,)),
            )
    if config.num_labels:
        score = weights["score"]
        table["score"] = dataclasses.replace(score, name=_PREFIX + score.name)
    return table


def _make_settings(
    adapter: Adapter, config: DecoderConfig, family: Family, base: str
) -> JsonObject:
    modules = lora.find_modules(config, family)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": [_name_target(module, modules) for module in adapter.modules],
        "modules_to_save": ["score"] if config.num_labels else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _match_inside(adapter: Adapter) -> str:
    """Return PEFT's pattern of the adapted modules of the text model, and of no others."""
    names = "|".join(re.escape(module.name) for module in adapter.modules)
    return rf"{re.escape(INSIDE)}layers\.\d+\.({names})"


def _name_target(module: Module, modules: tuple[Module, ...]) -> str:
    """Return the last part of the name, as is usual, unless another module has it too."""
    short = module.name.rpartition(".")[2]
    return short if lora.choose_modules((short,), modules) == (module,) else module.name


def _read_shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    file = folder / WEIGHTS
    if not file.exists():
        raise ModelError(
            f"{file}: missing; save the adapter with peft's "
            "save_pretrained(..., safe_serialization=True)"
        )
    entries = read_header(file)
    if wrong := [name for name, entry in entries.items() if entry.dtype not in FLOATS]:
        raise ModelError(
            f"{file}: {wrong[0]}: got type {entries[wrong[0]].dtype}, allowed: "
            f"{', '.join(FLOATS)}; save the adapter as numbers of one of these"
        )
    return {name: entry.shape for name, entry in entries.items()}


def _load(leaf: jax.ShapeDtypeStruct, tensor: Tensor, tensors: Tensors) -> jax.Array:
    """Read one array; an adapter is small, so every process reads it whole."""

    def read(shape: tuple[int, ...], name: str) -> np.ndarray:
        everything = tuple(slice(0, size) for size in shape)
        return tensor.read(shape, everything, tensors[name].__getitem__)

    if "{layer}" in tensor.name:
        layers = [read(leaf.shape[1:], tensor.name.format(layer=n)) for n in range(leaf.shape[0])]
        whole = np.stack(layers)
    else:
        whole = read(leaf.shape, tensor.name)
    whole = whole.astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])
