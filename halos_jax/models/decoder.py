"""The decoder: one forward pass for every family, over packed rows or padded sequences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from halos_jax.models import layers
from halos_jax.models.attention import attend_rows, attend_view, choose_backend
from halos_jax.models.head import compute_token_logps
from halos_jax.models.lookup import look_up_tokens, take_positions
from halos_jax.models.spec import DecoderConfig
from halos_jax.sharding import constrain
from halos_jax.types import Batch

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Names (jax.ad_checkpoint.checkpoint_name) whose values each remat policy keeps.
_SAVED_NAMES = {
    "full": (),
    "attention": ("qkv", "attended"),
    "matmuls": ("qkv", "attended", "mlp"),
}


def cast_params(params: Params, config: DecoderConfig) -> Params:
    """Cast params to the compute dtype."""
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), params)


def embed_tokens(params: Params, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """Look up `tokens i32[...]` as `[..., D]` in the compute dtype."""
    return look_up_tokens(_cast_table(params["embed"], config), tokens)


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
    positions: jax.Array,
    attend: Attend,
    config: DecoderConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Run one pre-norm block on `x [..., D]`; also return its keys and values `[..., K, H]`."""
    normed = layers.rms_norm(x, weights["attention_norm"], config.norm_eps)
    q, k, v = layers.project_qkv(normed, weights, positions, config)
    x = x + layers.project_out(attend(q, k, v), weights)
    normed = layers.rms_norm(x, weights["mlp_norm"], config.norm_eps)
    return x + layers.gated_mlp(normed, weights), (k, v)


def run_layers(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    config: DecoderConfig,
) -> jax.Array:
    """Run embedding, all blocks (one `lax.scan`) and the final norm: `[rows, T, D]`."""
    x = constrain(embed_tokens(params, tokens, config), "rows", None, None)

    def block(x, weights):
        weights = cast_params(weights, config)
        x, _ = run_block(x, weights, positions=positions, attend=attend, config=config)
        return constrain(x, "rows", None, None), None

    if config.remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES[config.remat])
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(block, x, params["layers"])
    scale = params["final_norm"].astype(config.compute_dtype)
    return layers.rms_norm(x, scale, config.norm_eps)


def encode_batch(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return the hidden states `[rows, T, D]` of a packed batch."""
    backend = choose_backend(config.attention, config.head_dim, config.compute_dtype)
    attend = functools.partial(attend_view, view=batch.view, backend=backend)
    return run_layers(params, batch.tokens, batch.positions, attend, config)


def encode_rows(
    params: Params, tokens: jax.Array, lengths: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Return the hidden states `[rows, T, D]` of one right-padded sequence a row."""
    backend = choose_backend(config.attention, config.head_dim, config.compute_dtype)
    attend = functools.partial(attend_rows, lengths=lengths, backend=backend)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return run_layers(params, tokens, positions, attend, config)


def compute_logits(
    params: Params, tokens: jax.Array, lengths: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Return all logits f32[rows, T, V] of one right-padded sequence a row; for small inputs."""
    hidden = encode_rows(params, tokens, lengths, config)
    head = get_head(params, config)
    return jnp.einsum("rtd,vd->rtv", hidden, head, preferred_element_type=jnp.float32)


def compute_logps(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return the log-probabilities f32[rows, P] of a batch's response tokens; 0 at padding."""
    hidden = encode_batch(params, batch, config)
    at_source = take_positions(hidden, batch.source)
    logps = compute_token_logps(
        at_source, get_head(params, config), batch.target, chunk=config.head_chunk
    )
    return jnp.where(batch.sequence < batch.sequences.role.shape[-1], logps, 0.0)


def compute_scores(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Return a sequence classifier's scores f32[rows, N], read at each sequence's last token.

    With one label the score is its logit, with two the logit of label 1.
    """
    hidden = encode_batch(params, batch, config)
    at_last = take_positions(hidden, batch.sequences.last)
    weights = params["score"][-1].astype(config.compute_dtype)
    return jnp.einsum("rnd,d->rn", at_last, weights, preferred_element_type=jnp.float32)
