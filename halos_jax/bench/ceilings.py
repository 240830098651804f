"""What the device can do at most, and how much work a case is."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from halos_jax.models import spec
from halos_jax.models.spec import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device."""

    flops: float  # of a large bfloat16 matmul, per second
    bytes: float  # read and written by a large copy, per second


def measure_ceilings(*, tiny: bool = False) -> Ceilings:
    """Measure a matmul and a copy on one device; `tiny` takes sizes that a CPU does at once."""
    size = 256 if tiny else 8192
    left, right = (
        jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1)
    )
    matmul = _time(jax.jit(jnp.matmul), left, right)
    # A number is added so that it is no alias; read once and written once.
    block = jnp.zeros((2**19 if tiny else 2**29,), jnp.float32)
    copy = _time(jax.jit(lambda x: x + 1), block)
    return Ceilings(flops=2 * size**3 / matmul, bytes=2 * block.nbytes / copy)


def _time(run: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 20) -> float:
    jax.block_until_ready(run(*arguments))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run(*arguments)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def count_decode_bytes(config: DecoderConfig, *, slots: int, mean_length: float) -> float:
    """Count the bytes that one decode step of `slots` sequences must read: weights and cache."""
    width = jnp.dtype(config.compute_dtype).itemsize
    weights = spec.count_params(config)
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.d_model  # the input table is only looked up
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return width * (weights + slots * mean_length * per_token)
