"""Which activations to keep for the backward pass: as many as fit in the device's memory."""

import dataclasses
import itertools
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config.execution import Remat
from halos_jax.integers import divide_up
from halos_jax.models.spec import DecoderConfig, count_params
from halos_jax.once import once_a_run
from halos_jax.training.teacher import Teacher
from halos_jax.types import Batch, TrainState

logger = logging.getLogger(__name__)

# The fastest first. "none" is not among them: a step is slower than with "matmuls", since it spends
# more time on memory traffic than it saves. For each of them, keeping the logits is tried before
# recomputing them, which costs less than the next one in the list.
_REMATS: tuple[Remat, ...] = ("matmuls", "gate", "attention", "full")
_SHARE = 0.94  # share of the memory to plan for; the allocator cannot use all of it


def choose_remat(
    config: DecoderConfig,
    batch: Batch,
    state: TrainState,
    mesh: Mesh,
    *,
    limit: int,
    teacher: Teacher | None = None,
    room: int = 0,
) -> DecoderConfig:
    """Return `config` with "auto" in `remat` and `head_remat` replaced by the fastest that fits.

    The choice depends on shapes and settings alone, so that a resumed run is the same program. It
    leaves room for one more model of the policy's size: a reward model or a frozen base.

    Args:
      batch: the batch of a step, `[m, rows, ...]`; arrays or tracers.
      state: the abstract state, with shardings.
      limit: bytes of a device, from `measure_memory`. If it is 0 (on a CPU), "auto" is "matmuls"
        and the logits are recomputed.
      teacher: that the loss compares the policy with; it needs room of its own.
      room: bytes of a device to leave besides, for the pass of a larger reference.
    """
    remats = _REMATS if config.remat == "auto" else (config.remat,)
    again = (False, True) if config.head_remat == "auto" else (config.head_remat,)
    if not limit:
        return dataclasses.replace(config, remat=remats[0], head_remat=again[-1])
    for chosen in itertools.product(remats, again):
        needed = _count_bytes(config, batch, state, mesh, *chosen)
        needed += _count_teacher(config, batch, mesh, teacher) + room
        if needed <= _SHARE * limit:
            break
    _log_choice(*chosen, batch.tokens.shape[-1], round(needed / 2**30, 1))
    return dataclasses.replace(config, remat=chosen[0], head_remat=chosen[1])


def measure_memory() -> int:
    """Return the usable bytes of a device, the same number on every process; 0 if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return sharding.take_from_first(stats.get("bytes_limit", 0) // 2**20) * 2**20


def _count_bytes(
    config: DecoderConfig,
    batch: Batch,
    state: TrainState,
    mesh: Mesh,
    remat: str,
    head_remat: bool,
) -> int:
    """Estimate the bytes that a device needs.

    They are the sum of what it holds all the time, of the activations that the blocks keep, and of
    the temporary memory of either the head or a block's backward pass, whichever needs more.
    """

    def measure(leaf: jax.ShapeDtypeStruct, width: int = 0) -> int:
        shard: tuple[int, ...] = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shard) * (width or leaf.dtype.itemsize)

    params = jax.tree.leaves(state.params)
    split: int = mesh.shape["tensor"]
    width: int = jnp.dtype(config.compute_dtype).itemsize
    other = count_params(config) * width // (split * mesh.shape["fsdp"])
    held: int = sum(map(measure, jax.tree.leaves(state))) + other
    if batch.tokens.shape[0] > 1:  # gradients are accumulated in float32
        held += sum(measure(leaf, 4) for leaf in params)

    rows = divide_up(batch.tokens.shape[1], mesh.shape["data"] * mesh.shape["fsdp"])
    tokens, positions = (rows * x.shape[-1] for x in (batch.tokens, batch.target))
    attended = config.num_heads * config.head_dim // split
    heads = attended + 2 * config.num_kv_heads * config.head_dim // split
    experts = config.experts
    mlp = (experts.d_mlp * experts.per_token if experts else config.d_mlp) // split
    gates = mlp if experts or config.gated_mlp else 0
    kept = {
        "full": 0,
        "attention": heads + attended,
        "gate": heads + attended + gates,
        "matmuls": heads + attended + gates + mlp,
        "none": 2 * (heads + attended) + 4 * mlp + 4 * config.d_model,
    }[remat]
    # Unrolled blocks have separate buffers, which are packed less tightly.
    spread = 1.5 if config.unroll_layers else 1
    blocks = spread * config.num_layers * (config.d_model + kept) * tokens * width
    block: int = (4 * config.d_model + 2 * (heads + attended) + 4 * mlp) * tokens * width
    words = 1 if config.num_labels else config.vocab_size // split
    chunk = min(config.head_chunk * rows, positions)
    marks = batch.transform is not None and batch.transform.kept is not None  # of kept tokens
    head: int = words * (2 * 4 * config.d_model + chunk * (4 + 2 * width + marks))
    if not head_remat:
        head += words * positions * width
    return held + int(blocks) + max(head, sum(map(measure, params)) + block)


def _count_teacher(config: DecoderConfig, batch: Batch, mesh: Mesh, teacher: Teacher | None) -> int:
    """Estimate the bytes that a device needs for the teacher: its params, its hidden states and one
    block's activations, its logits of a chunk and what they are compared by."""
    if teacher is None:
        return 0
    own, split = teacher.config, mesh.shape["tensor"]
    width: int = jnp.dtype(own.compute_dtype).itemsize
    rows = divide_up(batch.tokens.shape[1], mesh.shape["data"] * mesh.shape["fsdp"])
    tokens, positions = (rows * x.shape[-1] for x in (batch.tokens, batch.target))
    experts = own.experts
    mlp = (experts.d_mlp * experts.per_token if experts else own.d_mlp) // split
    attended = (2 * own.num_heads + 2 * own.num_kv_heads) * own.head_dim // split
    block = (4 * own.d_model + attended + 2 * mlp) * tokens * width
    words, chunk = own.vocab_size // split, min(config.head_chunk * rows, positions)
    compared = 3 * 4 * words * chunk  # the teacher's logits, the mixture, the slopes: float32
    held = count_params(own) * jnp.dtype(own.params_dtype).itemsize // (split * mesh.shape["fsdp"])
    total: int = held + max(block, compared) + positions * own.d_model * width
    return total


@once_a_run
def _log_choice(remat: str, head_remat: bool, tokens: int, gib: float) -> None:
    logger.info(
        "rows of %d tokens: model.remat=%s, model.head_remat=%s (about %.1f GiB a device)",
        tokens,
        remat,
        head_remat,
        gib,
    )
