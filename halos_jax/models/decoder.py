"""The decoder: one forward pass for every family, over packed rows or padded sequences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from halos_jax.models import layers
from halos_jax.models.attention.backends import attend_view, choose_backend
from halos_jax.models.attention.dense import Scoring
from halos_jax.models.attention.rope import Rotate, make_rotations
from halos_jax.models.gating import compute_gated_scores
from halos_jax.models.head import (
    Statistic,
    compute_token_logps,
    compute_token_statistics,
)
from halos_jax.models.lookup import look_up_tokens, take_positions
from halos_jax.models.quantized import Quantized, dequantize
from halos_jax.models.spec import DecoderConfig, LayerKind, list_layer_kinds
from halos_jax.sharding import constrain
from halos_jax.types import Batch, Params

# Of queries, keys, values and the heads' sinks [N] (None where a family has none).
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

# Names (jax.ad_checkpoint.checkpoint_name) whose values each remat policy keeps.
_SAVED_NAMES = {
    "full": (),
    "attention": ("qkv", "attended"),
    "gate": ("qkv", "attended", "gate"),
    "matmuls": ("qkv", "attended", "gate", "up"),
    "auto": ("qkv", "attended", "gate", "up"),  # where no trainer has chosen, see training.memory
}


def cast_params(params: Params, config: DecoderConfig) -> Params:
    """Cast params to the compute dtype; what is no number (a random key) stays as it is."""

    def cast(x: jax.Array | Quantized) -> jax.Array:
        if not isinstance(x, Quantized) and not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return dequantize(x, config.compute_dtype)

    made: Params = jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, Quantized))
    return made


def embed_tokens(params: Params, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """Look up `tokens i32[...]` as `[..., D]` in the compute dtype."""
    x = look_up_tokens(_cast_table(params["embed"], config), tokens)
    return x * jnp.asarray(config.d_model**0.5, x.dtype) if config.scale_embeddings else x


def get_head(params: Params, config: DecoderConfig) -> jax.Array:
    """Return the head `[V, D]`, the embedding where the two are tied, in the compute dtype."""
    return _cast_table(params["embed" if config.tie_embeddings else "head"], config)


def _cast_table(table: jax.Array, config: DecoderConfig) -> jax.Array:
    if table.dtype == config.compute_dtype:
        return table
    # Held where it is, so that devices which gather it send the compute dtype and not the params'.
    return constrain(table.astype(config.compute_dtype), "vocab", "embed")


def run_block(
    x: jax.Array,
    weights: Params,
    *,
    rotate: Rotate,
    attend: Attend,
    config: DecoderConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Run one block on `x [..., D]`; also return its keys and values `[..., K, H]`.

    A norm that `weights` do not have is left out.
    """
    normalize = functools.partial(layers.normalize, weights=weights, config=config)
    q, k, v = layers.project_qkv(normalize(x, name="attention_norm"), weights, rotate, config)
    attended = layers.project_out(attend(q, k, v, weights.get("sinks")), weights)
    after = x + normalize(attended, name="attention_post_norm")
    inner = x if config.parallel_residual else after
    out = layers.run_mlp(normalize(inner, name="mlp_norm"), weights, config)
    return after + normalize(out, name="mlp_post_norm"), (k, v)


def make_attend(run: Callable[..., jax.Array], config: DecoderConfig, kind: LayerKind) -> Attend:
    """Return `run`, of `models.attention` and given its view or cache, for layers of `kind`."""
    softcap = config.attention_softcap
    backend = choose_backend(
        config.attention, config.head_dim, config.compute_dtype, softcap, sinks=config.sinks
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        scoring = Scoring(config.attention_scale, softcap, kind.window, sinks)
        return run(q, k, v, backend=backend, scoring=scoring)

    return attend


def finish(params: Params, x: jax.Array, config: DecoderConfig) -> jax.Array:
    """Apply the final norm to `x [..., D]`."""
    norm = {name: params[name] for name in params if name.startswith("final_norm")}
    return layers.normalize(x, cast_params(norm, config), "final_norm", config)


def run_layers(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    run_attention: Callable[..., jax.Array],
    config: DecoderConfig,
) -> jax.Array:
    """Run embedding, all blocks (one `lax.scan`) and the final norm: `[rows, T, D]`.

    `run_attention` is what `make_attend` takes. Where layers are of several kinds, the number of a
    layer's kind is scanned beside its weights, and attention branches on it: the fused kernels
    want their window at compile time.
    """
    x = constrain(embed_tokens(params, tokens, config), "rows", None, None)
    kinds, kind_of_layer = list_layer_kinds(config)
    branches = [make_attend(run_attention, config, kind) for kind in kinds]
    rotation_of = make_rotations(config, positions)

    def block(x: jax.Array, scanned: tuple[Params, jax.Array | None]) -> tuple[jax.Array, None]:
        weights, kind = scanned
        weights = cast_params(weights, config)
        rotate, attend_kind = rotation_of(0), branches[0]
        if kind is not None:
            rotate = rotation_of(kind)
            attend_kind = functools.partial(jax.lax.switch, kind, branches)
        x, _ = run_block(x, weights, rotate=rotate, attend=attend_kind, config=config)
        return constrain(x, "rows", None, None), None

    if config.remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES[config.remat])
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    scanned_kinds = jnp.array(kind_of_layer) if len(kinds) > 1 else None
    scanned = (params["layers"], scanned_kinds)
    x, _ = jax.lax.scan(block, x, scanned, unroll=config.unroll_layers)
    return finish(params, x, config)


def encode_batch(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return the hidden states `[rows, T, D]` of a packed batch."""
    attend = functools.partial(attend_view, view=batch.view)
    return run_layers(params, batch.tokens, batch.positions, attend, config)


def compute_logps(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return the log-probabilities f32[rows, P] of a batch's response tokens; 0 at padding.

    They are those after `batch.transform`, where there is one.
    """
    hidden, head = encode_responses(params, batch, config), get_head(params, config)
    logps = compute_token_logps(hidden, head, batch.target, **_head_of(batch, config))
    return _mask_padding(logps, batch)


def encode_responses(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return the hidden states `[rows, P, D]` that predict a batch's response tokens."""
    return take_positions(encode_batch(params, batch, config), batch.source)


def compute_statistics(
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    config: DecoderConfig,
    statistic: Statistic = "entropy",
) -> tuple[jax.Array, jax.Array]:
    """Return `compute_logps` and a statistic of the policy, f32[rows, P], 0 at padding.

    Args:
      hidden: of `encode_responses`.
      statistic: see `head.compute_token_statistics`.
    """
    head, how = get_head(params, config), _head_of(batch, config)
    found = compute_token_statistics(hidden, head, batch.target, **how, statistic=statistic)
    return _mask_padding(found[0], batch), _mask_padding(found[1], batch)


def _head_of(batch: Batch, config: DecoderConfig) -> dict[str, Any]:
    return {
        "chunk": config.head_chunk,
        "softcap": config.logit_softcap,
        "keep": config.head_remat is False,
        "transform": batch.transform,
        "unknown": config.unknown_rows,
    }


def _mask_padding(values: jax.Array, batch: Batch) -> jax.Array:
    return jnp.where(batch.is_response, values, 0.0)


def compute_scores(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return a sequence classifier's scores f32[rows, sequences], read at their last tokens.

    With one label the score is its logit, with two the logit of label 1; for a head of several
    objectives see `models.gating`.
    """
    hidden = encode_batch(params, batch, config)
    if config.gating is not None:
        return compute_gated_scores(params, hidden, batch, config.gating)
    at_last = take_positions(hidden, batch.sequences.last)
    weights = params["score"][-1].astype(config.compute_dtype)
    return jnp.einsum("rnd,d->rn", at_last, weights, preferred_element_type=jnp.float32)
