"""The case that compares numbers, not times: the fast paths with the plain ones, on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.bench.ceilings import Ceilings
from halos_jax.bench.sampling import make_numbered_prompts, make_token_renderer
from halos_jax.bench.training import draw_params
from halos_jax.bench.workloads import Case, make_decoder, make_items
from halos_jax.config import Config
from halos_jax.losses import get_loss
from halos_jax.models import decoder as decoders
from halos_jax.models.spec import DecoderConfig
from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.training.step import loss_and_gradient
from halos_jax.types import TARGET, Batch, Item, Params

_LAYERS = 2
_FAST: dict[str, Any] = {"remat": "matmuls", "head_remat": False}
_PLAIN: dict[str, Any] = {"remat": "none", "head_remat": True, "attention": "xla"}


def run_agreement_case(
    case: Case, config: Config, mesh: Mesh, ceilings: Ceilings
) -> dict[str, float | bool]:
    """Return how far gradients and log-probs are from float32, on the fast paths and on the plain
    ones, and whether the fast ones give the same bits twice.

    `*_error` are norms of differences over norms, of the two first layers of the case's model.
    """
    model = dataclasses.replace(make_decoder(case, config.model), num_layers=_LAYERS)
    model = dataclasses.replace(model, params_dtype=model.compute_dtype, init_std=0.05)
    params = draw_params(model, mesh, seed=0)
    items = make_items(case, steps=1, vocab_size=model.vocab_size)
    batch = _pack(items, config, mesh)
    loss = get_loss({"name": case.loss})

    def compile_gradient(options: dict[str, Any]) -> Callable[[Params, Batch], Params]:
        chosen = dataclasses.replace(model, **options)
        return jax.jit(
            lambda params, batch: loss_and_gradient(params, None, batch, loss, chosen)[1]
        )

    run_fast = compile_gradient(_FAST)  # one program: another compilation may choose other kernels
    fast, again = run_fast(params, batch), run_fast(params, batch)
    plain = compile_gradient(_PLAIN)(params, batch)
    wide = {"compute_dtype": "float32", "params_dtype": "float32"}
    with jax.default_matmul_precision("highest"):
        wide_params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        exact = compile_gradient(_PLAIN | wide)(wide_params, batch)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), fast, again)
    return {
        "gradient_error": _measure_error(fast, exact),
        "gradient_error_plain": _measure_error(plain, exact),
        "same_bits_twice": all(jax.tree.leaves(same)),
        **_compare_logps(model, params, config, mesh),
    }


def _compare_logps(
    model: DecoderConfig, params: Params, config: Config, mesh: Mesh
) -> dict[str, float]:
    """Hold the log-probs under which the sampler draws against those that training computes."""
    settings = dataclasses.replace(
        config.sampling, slots=16, num_samples_per_prompt=2, max_tokens=32, keep_logps=True
    )
    length = min(64, settings.max_prompt_length)
    renderer = make_token_renderer(frozenset(), length, model.vocab_size)
    sampler = make_sampler(settings, renderer, model, mesh)
    prompts = make_numbered_prompts(8)
    samples = sample_shard(sampler, sampler.unstack(params), prompts, seed=0, round=1)
    items = [
        Item(np.array(one.prompt_ids), (np.array(one.response_ids),), (TARGET,)) for one in samples
    ]
    plan = plan_batches(items, batch_size=len(items), num_rows=1, tokens_per_row=10**6)
    batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
    run = jax.jit(decoders.compute_logps, static_argnums=2)
    packed = np.asarray(run(params, batch, dataclasses.replace(model, **_FAST)))[None]
    by_item = {index: logps for index, (logps,) in split_logps(plan, 0, items, packed)}
    drawn = np.concatenate([np.array(one.logps) for one in samples])
    trained = np.concatenate([by_item[index] for index in range(len(items))])
    return {"logp_error": float(np.linalg.norm(drawn - trained) / np.linalg.norm(trained))}


def _pack(items: list[Item], config: Config, mesh: Mesh) -> Batch:
    plan = plan_batches(
        items,
        batch_size=len(items),
        num_rows=sharding.num_row_shards(mesh),
        tokens_per_row=config.train.tokens_per_device,
        row_multiple=config.train.row_multiple,
    )
    return sharding.put_batch(build_batch(items, plan, 0), mesh, leading=1)


def _measure_error(found: object, exact: object) -> float:
    def norm(tree: object) -> float:
        return float(np.sqrt(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(tree))))

    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y, found, exact)
    return norm(difference) / norm(exact)
