"""LoRA (Hu et al. 2021): a small trained overlay on a frozen base.

For a weight W of a frozen module, `x W` becomes `x W + scale * (x a) b`: `a` is `[in..., R]`, `b`
is `[R, out...]`, and `b` starts at zero, so that a fresh adapter is the base itself. The arrays
stand beside the weight that they adapt, as a bias does: "layers/q" has "layers/q_lora_a" and
"layers/q_lora_b". What is trained is a tree of these alone (and of the score head of a reward
model); `attach_adapter` lays it over the base for a forward pass, `merge_adapter` adds it in.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from halos_jax.config import LoraConfig
from halos_jax.models import spec
from halos_jax.models.hf.families import ModelError, list_tensors
from halos_jax.models.hf.family_table import Family
from halos_jax.models.layers import Dropout
from halos_jax.models.quantized import Quantized, dequantize, quantize
from halos_jax.models.spec import DecoderConfig, ParamSpec
from halos_jax.types import Params

ALL_LINEAR = "all-linear"
# The linear layers of a block -> the number of leading axes of theirs (after L) that are inputs.
_NUM_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
# The weights of experts, which have no adapter; their first axis after L is not summed over.
_EXPERTS = ("expert_gate", "expert_up", "expert_down")
# What no adapter has, but is trained beside it: the head of a reward model.
_TRAINED_WHOLE = ("score",)


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer as the family's checkpoint has it: one or, fused, several weights of ours."""

    name: str  # its Hugging Face name inside a layer, "self_attn.q_proj"
    paths: tuple[str, ...]  # ("q",); of a fused one ("q", "k", "v")

    @property
    def a_name(self) -> str:
        """The name of its `a`, which all weights of a fused module share, as in PEFT."""
        return f"{'_'.join(self.paths)}_lora_a"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter is, apart from its arrays."""

    rank: int
    alpha: float
    modules: tuple[Module, ...]
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0  # of the dropout

    @property
    def scale(self) -> float:
        """`alpha / rank`, or rsLoRA's `alpha / sqrt(rank)` (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@struct.dataclass
class Frozen:
    """What a training step reads and does not change: the base, and how the adapter applies."""

    base: Params
    adapter: Adapter = struct.field(pytree_node=False)
    dropout_key: jax.Array | None = None  # None: no dropout (evaluation, the reference, sampling)


# --------------------------------------------------------------------------- what is adapted


def find_modules(config: DecoderConfig, family: Family) -> tuple[Module, ...]:
    """Return the linear layers of a block of `config`, by their names in `family`'s checkpoints."""
    paths_of: dict[str, list[str]] = {}
    for path, tensor in list_tensors(config, family).items():
        section, _, name = path.partition("/")
        if section == "layers" and name in _NUM_INPUTS:
            module = tensor.name.partition("{layer}.")[2].removesuffix(".weight")
            paths_of.setdefault(module, []).append(name)
    return tuple(
        # In the order in which a fused tensor has them.
        Module(module, tuple(sorted(paths, key=list(_NUM_INPUTS).index)))
        for module, paths in paths_of.items()
    )


def make_adapter(
    settings: LoraConfig, config: DecoderConfig, family: Family, *, seed: int
) -> Adapter:
    """Return the adapter that `config.lora` asks for; `seed` is that of its dropout.

    Raises:
      ModelError: if a target is no linear layer of the model.
    """
    modules = choose_modules(settings.targets, find_modules(config, family))
    alpha = settings.alpha or 4.0 * settings.rank
    return Adapter(settings.rank, alpha, modules, settings.dropout, settings.rslora, seed)


def choose_modules(targets: Sequence[str], modules: Sequence[Module]) -> tuple[Module, ...]:
    """Return the modules that a target names, in PEFT's way: whole, or by the end of the name."""
    if tuple(targets) == (ALL_LINEAR,):
        return tuple(modules)

    def hits(target: str, module: Module) -> bool:
        return module.name == target or module.name.endswith(f".{target}")

    unknown = [target for target in targets if not any(hits(target, one) for one in modules)]
    if unknown:
        names = ", ".join(module.name.rpartition(".")[2] for module in modules)
        raise ModelError(
            f"lora.targets: got {', '.join(map(repr, unknown))}; allowed: {ALL_LINEAR!r} alone, or "
            f"a tuple ('NAME',...) of linear layers of this model's blocks: {names}"
        )
    return tuple(one for one in modules if any(hits(target, one) for target in targets))


# --------------------------------------------------------------------------- what is trained


def make_spec(adapter: Adapter, config: DecoderConfig) -> dict[str, Any]:
    """Return the spec tree of what is trained: the adapter, and a reward model's score head."""
    whole = spec.make_spec(config)
    layers = {}
    for module in adapter.modules:
        for path in module.paths:
            weight, inputs = whole["layers"][path], 1 + _NUM_INPUTS[path]
            layers[module.a_name] = ParamSpec(
                (*weight.shape[:inputs], adapter.rank), (*weight.axes[:inputs], None), "kaiming"
            )
            layers[f"{path}_lora_b"] = ParamSpec(
                (weight.shape[0], adapter.rank, *weight.shape[inputs:]),
                (None, None, *weight.axes[inputs:]),
                "zeros",
            )
    return {"layers": layers, **{name: whole[name] for name in _TRAINED_WHOLE if name in whole}}


def abstract_trained(config: DecoderConfig, mesh: Mesh, adapter: Adapter | None) -> Params:
    """Return what is trained, the adapter or (None) all params, as sharded ShapeDtypeStructs."""
    if adapter is None:
        return spec.abstract_params(config, mesh)
    return spec.abstract_arrays(make_spec(adapter, config), mesh, config.params_dtype)


def init_adapter(seed: int, frozen: Frozen, config: DecoderConfig, mesh: Mesh) -> Params:
    """Return a fresh adapter for `frozen`: each `a` drawn from (seed, its name), each `b` zero.

    `a` is uniform in +- 1 / sqrt(inputs), which is what PEFT draws. A score head is the base's.
    """
    wanted = abstract_trained(config, mesh, frozen.adapter)

    def draw(name: str, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if not name.endswith("_lora_a"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
        # Drawn flat, and the factor held apart, for the reasons given in `spec.init_params`.
        values = jax.random.uniform(key, (math.prod(leaf.shape),), jnp.float32, -1.0, 1.0)
        values = jax.lax.optimization_barrier(values.reshape(leaf.shape))
        drawn: jax.Array = (values * bound).astype(leaf.dtype)
        return drawn

    def init(key: jax.Array) -> Params:
        layers = {
            name: draw(name, leaf, jax.random.fold_in(key, index))
            for index, (name, leaf) in enumerate(sorted(wanted["layers"].items()))
        }
        return {"layers": layers}

    with jax.set_mesh(mesh):
        shardings = {"layers": {name: leaf.sharding for name, leaf in wanted["layers"].items()}}
        made: Params = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return made | take_whole(frozen.base, config)


def take_whole(base: Params, config: DecoderConfig) -> Params:
    """Return a copy of what is trained in full beside an adapter, in the params' dtype."""
    return {
        name: jnp.array(base[name], config.params_dtype, copy=True)
        for name in _TRAINED_WHOLE
        if name in base
    }


def quantize_base(base: Params, kind: str) -> Params:
    """Return `base`, which is taken over, with the linear layers of its blocks as `kind`.

    Embedding, head, norms and routers stay as they are. See `models.quantized`.
    """
    inputs_of: dict[str, Sequence[int]]
    inputs_of = {name: range(1, 1 + count) for name, count in _NUM_INPUTS.items()}
    inputs_of |= dict.fromkeys(_EXPERTS, (2,))
    layers = base["layers"]
    # One after the other, each in place of the one that it was: both never exist in whole. Sorted:
    # processes that share the weights must quantize them in one order.
    for name in sorted(layers.keys() & inputs_of):
        layers[name] = jax.block_until_ready(quantize(layers.pop(name), kind, inputs_of[name]))
    return base


# --------------------------------------------------------------------------- what is run


def attach_adapter(params: Params, frozen: Frozen | None) -> Params:
    """Return the params that the decoder reads: the base with the adapter beside its weights.

    `b` is scaled here, so that the forward pass knows of nothing but arrays. Without a frozen
    part `params` are the whole model.
    """
    if frozen is None:
        return params
    adapter, layers = frozen.adapter, dict(frozen.base["layers"])
    for module in adapter.modules:
        for path in module.paths:
            layers[f"{path}_lora_a"] = params["layers"][module.a_name]
            layers[f"{path}_lora_b"] = params["layers"][f"{path}_lora_b"] * adapter.scale
    if frozen.dropout_key is not None:
        num_layers = len(jax.tree.leaves(frozen.base["layers"])[0])
        keys = jax.random.split(frozen.dropout_key, num_layers)
        layers["lora_dropout"] = Dropout(keys, adapter.dropout)
    return {**frozen.base, **params, "layers": layers}


def start_dropout(frozen: Frozen | None, step: jax.Array) -> Frozen | None:
    """Return `frozen` with the dropout of an optimizer step, where the adapter has dropout.

    The masks are a function of (seed, step, microbatch, layer) and of the place in the microbatch.
    """
    if frozen is None or not frozen.adapter.dropout:
        return frozen
    key = jax.random.key(frozen.adapter.seed)
    return dataclasses.replace(frozen, dropout_key=jax.random.fold_in(key, step))


def fold_microbatch(frozen: Frozen | None, number: jax.Array | int) -> Frozen | None:
    """Return `frozen` with the dropout of one microbatch of the step."""
    if frozen is None or frozen.dropout_key is None:
        return frozen
    key = jax.random.fold_in(frozen.dropout_key, number)
    return dataclasses.replace(frozen, dropout_key=key)


# --------------------------------------------------------------------------- merged


@struct.dataclass
class Adapted:
    """A weight `[L, in..., out...]` to which its adapter has still to be added."""

    weight: jax.Array | Quantized
    a: jax.Array  # [L, in..., R]
    b: jax.Array  # [L, R, out...], scaled


def merge_adapter(params: Params, frozen: Frozen | None) -> Params:
    """Return the plain params of base + adapter, whose adapted weights are added up when read.

    Adapted weights are `Adapted`, to be read by `take_layer`: the sampler and the export go layer
    by layer, and the base is never held twice. Without a frozen part `params` are returned.
    """
    if frozen is None:
        return params
    attached = attach_adapter(params, dataclasses.replace(frozen, dropout_key=None))
    layers = dict(frozen.base["layers"])
    for path in (path for module in frozen.adapter.modules for path in module.paths):
        a, b = (attached["layers"][f"{path}_lora_{end}"] for end in "ab")
        layers[path] = Adapted(layers[path], a, b)
    return {**attached, "layers": layers}


def take_layer(
    leaf: jax.Array | Quantized | Adapted, layer: jax.Array | int, dtype: Any
) -> jax.Array:
    """Return one layer of a stacked array as `dtype`; an adapter is added in float32."""
    if not isinstance(leaf, Adapted):
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return dequantize(jax.tree.map(take, leaf), dtype)
    weight, a, b = (take_layer(part, layer, jnp.float32) for part in (leaf.weight, leaf.a, leaf.b))
    return (weight + jnp.tensordot(a, b, 1, precision="highest")).astype(dtype)
