"""The decoder's configuration and its spec tree: path -> shape, logical axes, initialiser.

The spec tree is the single source of initialisation, shardings, abstract params, import checks
and checkpoint templates. Params are plain nested dicts of arrays with the layers stacked on the
first axis: `params["layers"]["q"]` is `[L, D, N, H]`.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config.execution import Dtype, Execution, Remat
from halos_jax.types import Params


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021); `kind` says how it is stretched to `factor`.

    "none" is no position at all (Kazemnejad et al. 2023, NoPE).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "none"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # of llama3, in turns within the original length
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    fraction: float = 1.0  # share of a head's dimensions that are rotated
    beta_fast: float = 32.0  # of yarn, in turns within the original length
    beta_slow: float = 1.0
    truncate: bool = True  # yarn's bounds are whole dimensions
    attention_factor: float = 1.0  # of yarn and longrope: queries and keys are multiplied by it
    factors: tuple[float, ...] = ()  # of longrope: each pair's own
    longest: int = 0  # tokens up to which the angles are these; 0: any number


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of each MLP; see `models.experts`."""

    num_experts: int
    per_token: int  # experts that each token goes to
    d_mlp: int  # of one expert
    normalize: bool = True  # the weights of a token's experts sum to one
    bias: bool = False  # of the router and of every expert's layers


@dataclasses.dataclass(frozen=True)
class ClampedGate:
    """A gated MLP's hidden layer `(up + 1) * gate * sigmoid(alpha * gate)` (gpt-oss).

    Before it, gates are clamped to `limit` from above and ups to +- `limit`.
    """

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class GatingConfig:
    """A reward head of several objectives, weighed by the prompt; see `models.gating`."""

    num_objectives: int = 19
    num_hidden: int = 3  # layers of the gating network before its last
    hidden_dim: int = 1024
    temperature: float = 10.0
    prompt_end: tuple[int, ...] = ()  # tokens that end every prompt; the gate reads the first


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Execution):
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
    gating: GatingConfig | None = None  # of a classifier: its head, in place of a linear one
    init_std: float = 0.02
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None  # of the layers with a window; None: as all others
    windows: tuple[
        int, ...
    ] = ()  # tokens that a layer sees, itself included; 0: all; (): no window
    unrotated: tuple[bool, ...] = ()  # layers without rotary embedding; (): none is
    norm: Literal["rms", "rms_offset", "layer"] = "rms"  # offset: the scale is stored less one
    pre_norm: bool = True  # norms of what enters attention and MLP
    post_norm: bool = False  # norms of what leaves them, before it is added
    qk_norm: Literal["none", "head", "all"] = "none"  # over a head's dimensions, or all heads'
    parallel_residual: bool = False  # the MLP reads what attention reads
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    experts: ExpertsConfig | None = None  # None: one MLP
    activation: str = "silu"  # of `models.activations`
    clamped_gate: ClampedGate | None = None  # in place of the activation
    sinks: bool = False  # each head has a score beside the keys' that leads to no value
    scale_embeddings: bool = False  # by sqrt(D)
    attention_scale: float | None = None  # of the scores; None: H^-0.5
    attention_softcap: float = 0.0  # scores -> cap * tanh(scores / cap); 0: no cap
    logit_softcap: float = 0.0
    max_positions: int = 0  # that the model was made for; 0: unknown
    # Rows of embedding and head that are new tokens' (beside those beyond the checkpoint's), and
    # how they are filled, see `models.vocab`.
    new_rows: tuple[int, ...] = ()
    new_rows_init: Literal["mean", "random"] = "mean"
    unknown_rows: tuple[tuple[int, int], ...] = ()  # ranges [start, stop) of rows without a token
    # Without settings nothing is left to be chosen by itself.
    _: dataclasses.KW_ONLY
    compute_dtype: Dtype = "float32"
    remat: Remat = "none"
    head_remat: bool | Literal["auto"] = True
    head_chunk: int = 2048


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets the attention of a layer apart from that of others."""

    window: int
    rope: RopeConfig


def list_layer_kinds(config: DecoderConfig) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Return the distinct kinds of layers, and the number of each layer's kind among them."""
    windows = config.windows or (0,) * config.num_layers
    unrotated = config.unrotated or (False,) * config.num_layers
    local_rope = config.local_rope or config.rope
    no_rope = dataclasses.replace(config.rope, kind="none", attention_factor=1.0)

    def choose_rope(layer: int) -> RopeConfig:
        if unrotated[layer]:
            return no_rope
        return local_rope if windows[layer] else config.rope

    of_layer = [LayerKind(window, choose_rope(layer)) for layer, window in enumerate(windows)]
    kinds = tuple(dict.fromkeys(of_layer))
    return kinds, tuple(kinds.index(kind) for kind in of_layer)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes and initialiser of one array.

    `init` is "normal", "scaled_normal", "ones" or "zeros".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"


def make_spec(config: DecoderConfig) -> dict[str, Any]:
    """Return the spec tree: nested dicts of `ParamSpec` with the structure of the params.

    A norm, bias or gate that a family lacks has no array here, and what has no array is left out
    of the forward pass: this is the one place that reads those switches.
    """
    c = config
    layers: dict[str, ParamSpec] = {}
    for part, leaves in {"attention": _attention_spec(c), "mlp": _mlp_spec(c)}.items():
        layers |= _norm_spec(c, f"{part}_norm") if c.pre_norm else {}
        layers |= leaves
        layers |= _norm_spec(c, f"{part}_post_norm") if c.post_norm else {}
    spec: dict[str, Any] = {
        "embed": ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed")),
        "layers": {
            name: ParamSpec((c.num_layers, *leaf.shape), (None, *leaf.axes), leaf.init)
            for name, leaf in layers.items()
        },
        **_norm_spec(c, "final_norm"),
    }
    if c.gating is not None:
        spec |= _gating_spec(c.gating, c.d_model)
    elif c.num_labels:
        spec["score"] = ParamSpec((c.num_labels, c.d_model), (None, "embed"))
    elif not c.tie_embeddings:
        spec["head"] = ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed"))
    return spec


def _gating_spec(gating: GatingConfig, d_model: int) -> dict[str, Any]:
    objectives = gating.num_objectives
    sizes = (d_model, *[gating.hidden_dim] * gating.num_hidden, objectives)
    network = {"scale": ParamSpec((1,), (None,), "ones")}
    for layer, shape in enumerate(itertools.pairwise(sizes)):
        network[f"weight_{layer}"] = ParamSpec(shape, (None if layer else "embed", None))
        network[f"bias_{layer}"] = ParamSpec(shape[1:], (None,), "zeros")
    return {
        "objectives": ParamSpec((objectives, d_model), (None, "embed")),
        "transform": ParamSpec((objectives, objectives), (None, None)),
        "gating": network,
    }


def _norm_spec(c: DecoderConfig, name: str) -> dict[str, ParamSpec]:
    norm = {name: ParamSpec((c.d_model,), ("embed",), _scale_init(c))}
    if c.norm == "layer":
        norm[f"{name}_bias"] = ParamSpec((c.d_model,), ("embed",), "zeros")
    return norm


def _scale_init(c: DecoderConfig) -> str:
    return "zeros" if c.norm == "rms_offset" else "ones"


def _attention_spec(c: DecoderConfig) -> dict[str, ParamSpec]:
    spec = {}
    for name, axis in {"q": "heads", "k": "kv_heads", "v": "kv_heads"}.items():
        heads = (c.num_heads if name == "q" else c.num_kv_heads, c.head_dim)
        spec[name] = ParamSpec((c.d_model, *heads), ("embed", axis, None))
        if c.qkv_bias:
            spec[f"{name}_bias"] = ParamSpec(heads, (axis, None), "zeros")
        if c.qk_norm != "none" and name != "v":
            spec[f"{name}_norm"] = (
                ParamSpec(heads, (axis, None), _scale_init(c))
                if c.qk_norm == "all"
                else ParamSpec(heads[1:], (None,), _scale_init(c))
            )
    spec["o"] = ParamSpec(
        (c.num_heads, c.head_dim, c.d_model), ("heads", None, "embed"), "scaled_normal"
    )
    if c.sinks:
        spec["sinks"] = ParamSpec((c.num_heads,), ("heads",))
    if c.out_bias:
        spec["o_bias"] = ParamSpec((c.d_model,), ("embed",), "zeros")
    return spec


def _mlp_spec(c: DecoderConfig) -> dict[str, ParamSpec]:
    if c.experts is not None:
        return _experts_spec(c.experts, c.d_model)
    spec = {}
    for name in ("gate", "up") if c.gated_mlp else ("up",):
        spec[name] = ParamSpec((c.d_model, c.d_mlp), ("embed", "mlp"))
        if c.mlp_bias:
            spec[f"{name}_bias"] = ParamSpec((c.d_mlp,), ("mlp",), "zeros")
    spec["down"] = ParamSpec((c.d_mlp, c.d_model), ("mlp", "embed"), "scaled_normal")
    if c.mlp_bias:
        spec["down_bias"] = ParamSpec((c.d_model,), ("embed",), "zeros")
    return spec


def _experts_spec(experts: ExpertsConfig, d_model: int) -> dict[str, ParamSpec]:
    shape = (experts.num_experts, d_model, experts.d_mlp)
    axes, back = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    spec = {
        "router": ParamSpec(shape[1::-1], ("embed", None)),
        "expert_gate": ParamSpec(shape, axes),
        "expert_up": ParamSpec(shape, axes),
        "expert_down": ParamSpec((shape[0], *shape[:0:-1]), back, "scaled_normal"),
    }
    if experts.bias:
        biases = {
            f"{name}_bias": ParamSpec(leaf.shape[::2], leaf.axes[::2], "zeros")
            for name, leaf in spec.items()
            if name != "router"
        }
        spec |= {"router_bias": ParamSpec(shape[:1], (None,), "zeros"), **biases}
    return spec


@functools.partial(jax.jit, static_argnums=1)
def init_params(key: jax.Array, config: DecoderConfig) -> Params:
    """Draw the params of `config`; each array depends only on (key, its path).

    Matrices are normal with `init_std`; the two that write into the residual stream are scaled by
    1 / sqrt(2 L) (Radford et al. 2019, GPT-2).
    """
    flat = traverse_util.flatten_dict(make_spec(config), sep="/")

    def draw(index: int, leaf: ParamSpec) -> jax.Array:
        if leaf.init in ("ones", "zeros"):
            return jnp.full(leaf.shape, float(leaf.init == "ones"), config.params_dtype)
        scale = 1 / math.sqrt(2 * config.num_layers) if leaf.init == "scaled_normal" else 1.0
        # Drawn flat: XLA's CPU compiler needs many times longer for the same draw in several axes.
        values = jax.random.normal(
            jax.random.fold_in(key, index), (math.prod(leaf.shape),), jnp.float32
        )
        # The barrier keeps XLA from merging the factors, in one way on one mesh and not on another.
        values = jax.lax.optimization_barrier(values.reshape(leaf.shape))
        values = values * (config.init_std * scale)
        drawn: jax.Array = values.astype(config.params_dtype)
        return drawn

    names = sorted(flat)
    params: Params = traverse_util.unflatten_dict(
        {name: draw(index, flat[name]) for index, name in enumerate(names)}, sep="/"
    )
    return params


def abstract_arrays(spec: Params, mesh: Mesh, dtype: str) -> Params:
    """Return a spec tree as `jax.ShapeDtypeStruct`s of `dtype` that carry their shardings."""

    def make(leaf: ParamSpec) -> jax.ShapeDtypeStruct:
        placed = sharding.named_sharding(leaf.axes, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=placed)

    made: Params = jax.tree.map(make, spec, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return made


def abstract_params(config: DecoderConfig, mesh: Mesh) -> Params:
    """Return the params as `jax.ShapeDtypeStruct`s that carry their shardings."""
    return abstract_arrays(make_spec(config), mesh, config.params_dtype)


def params_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """Return the tree of NamedShardings of the params."""
    shardings: Params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
    return shardings


def list_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the params, under its path joined by "/"."""
    flat = traverse_util.flatten_dict(make_spec(config), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def count_params(config: DecoderConfig) -> int:
    """Return the number of parameters."""
    return sum(map(math.prod, list_shapes(config).values()))
