"""The decoder's configuration and its spec tree: path -> shape, logical axes, initialiser.

The spec tree is the single source of initialisation, shardings, abstract params, import checks
and checkpoint templates. Params are plain nested dicts of arrays with the layers stacked on the
first axis: `params["layers"]["q"]` is `[L, D, N, H]`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from halos_jax import sharding

Remat = Literal["none", "full", "attention", "matmuls"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021); `kind` "llama3" rescales low frequencies."""

    theta: float = 10_000.0
    kind: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture (from its Hugging Face config) and execution (`config.model`)."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    num_labels: int = 0  # 0: a language model; 1 or 2: a sequence classifier
    init_std: float = 0.02
    rope: RopeConfig = RopeConfig()
    params_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: Remat = "none"
    head_chunk: int = 2048


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes and initialiser ("normal", "scaled_normal", "ones") of one array."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"


def make_spec(config: DecoderConfig) -> dict[str, Any]:
    """Return the spec tree: nested dicts of `ParamSpec` with the structure of the params."""
    c = config
    layers = {
        "attention_norm": ParamSpec((c.d_model,), ("embed",), "ones"),
        "q": ParamSpec((c.d_model, c.num_heads, c.head_dim), ("embed", "heads", None)),
        "k": ParamSpec((c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None)),
        "v": ParamSpec((c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None)),
        "o": ParamSpec(
            (c.num_heads, c.head_dim, c.d_model), ("heads", None, "embed"), "scaled_normal"
        ),
        "mlp_norm": ParamSpec((c.d_model,), ("embed",), "ones"),
        "gate": ParamSpec((c.d_model, c.d_mlp), ("embed", "mlp")),
        "up": ParamSpec((c.d_model, c.d_mlp), ("embed", "mlp")),
        "down": ParamSpec((c.d_mlp, c.d_model), ("mlp", "embed"), "scaled_normal"),
    }
    spec = {
        "embed": ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed")),
        "layers": {
            name: ParamSpec((c.num_layers, *leaf.shape), (None, *leaf.axes), leaf.init)
            for name, leaf in layers.items()
        },
        "final_norm": ParamSpec((c.d_model,), ("embed",), "ones"),
    }
    if c.num_labels:
        spec["score"] = ParamSpec((c.num_labels, c.d_model), (None, "embed"))
    elif not c.tie_embeddings:
        spec["head"] = ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed"))
    return spec


@functools.partial(jax.jit, static_argnums=1)
def init_params(key: jax.Array, config: DecoderConfig) -> dict[str, Any]:
    """Draw the params of `config`; each array depends only on (key, its path).

    Matrices are normal with `init_std`; the two that write into the residual stream are scaled by
    1 / sqrt(2 L) (Radford et al. 2019, GPT-2).
    """
    flat = traverse_util.flatten_dict(make_spec(config), sep="/")

    def draw(index: int, leaf: ParamSpec) -> jax.Array:
        if leaf.init == "ones":
            return jnp.ones(leaf.shape, config.params_dtype)
        scale = 1 / math.sqrt(2 * config.num_layers) if leaf.init == "scaled_normal" else 1.0
        # Drawn flat: XLA's CPU compiler needs many times longer for the same draw in several axes.
        values = jax.random.normal(
            jax.random.fold_in(key, index), (math.prod(leaf.shape),), jnp.float32
        )
        values = values.reshape(leaf.shape) * (config.init_std * scale)
        return values.astype(config.params_dtype)

    names = sorted(flat)
    return traverse_util.unflatten_dict(
        {name: draw(index, flat[name]) for index, name in enumerate(names)}, sep="/"
    )


def abstract_params(config: DecoderConfig, mesh: Mesh) -> dict[str, Any]:
    """Return the params as `jax.ShapeDtypeStruct`s that carry their shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.dtype(config.params_dtype),
            sharding=sharding.named_sharding(leaf.axes, leaf.shape, mesh),
        ),
        make_spec(config),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )


def params_shardings(config: DecoderConfig, mesh: Mesh) -> dict[str, Any]:
    """Return the tree of NamedShardings of the params."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))


def count_params(config: DecoderConfig) -> int:
    """Return the number of parameters."""
    return sum(
        math.prod(leaf.shape) for leaf in traverse_util.flatten_dict(make_spec(config)).values()
    )
