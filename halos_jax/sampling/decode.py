"""Decoding on the device: slots that hold sequences, advanced by chunks of steps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Int32, UInt32

from halos_jax.models import cache as caches
from halos_jax.models.spec import DecoderConfig
from halos_jax.sampling.draws import DecodeSettings, ExactDraws, draw_exactly, draw_tokens
from halos_jax.sharding import constrain
from halos_jax.types import Array, Params

# Made on the host, traced on the device.
Rows = jax.Array | np.ndarray
# Keys or values of prompts, one [prompts, T, K, H] a layer.
Prompts = tuple[jax.Array, ...]


@struct.dataclass
class Slots:
    """The state of all slots; an idle slot has `done` set."""

    cache: caches.Cache
    token: Int32[Array, " S"]  # the next token to feed
    position: Int32[Array, " S"]  # where it stands
    generated: Int32[Array, " S"]  # response tokens drawn so far
    done: Bool[Array, " S"]
    key: UInt32[Array, "S 2"]  # key data of the sample


@struct.dataclass
class ChunkOutput:
    """What one chunk drew: `count[s]` leading entries of row s are real."""

    tokens: Int32[Array, "S chunk"]
    logps: Float32[Array, "S chunk"]  # of the unfiltered policy at temperature 1
    entropies: Float32[Array, "S chunk"]  # nats, of its distribution at each token
    count: Int32[Array, " S"]
    done: Bool[Array, " S"]
    # Of exact draws (`draws.ExactDraws`):
    drawn_logps: Float32[Array, "S chunk"] | None = None
    kept: Int32[Array, "S chunk kept"] | None = None


@struct.dataclass
class Admission:
    """Samples that enter slots; a slot number of S or more is padding."""

    slot: Int32[Rows, " admitted"]
    source: Int32[Rows, " admitted"]  # row of the prefilled prompts
    token: Int32[Rows, " admitted"]  # last token of the prompt
    position: Int32[Rows, " admitted"]  # its position
    key: UInt32[Rows, "admitted 2"]


def init_slots(config: DecoderConfig, *, slots: int, length: int) -> Slots:
    """Return `slots` idle slots for sequences of at most `length` tokens."""
    zeros = jnp.zeros((slots,), jnp.int32)
    made = Slots(
        cache=caches.init_cache(config, slots=slots, length=length),
        token=zeros,
        position=zeros,
        generated=zeros,
        done=jnp.ones((slots,), bool),
        key=jnp.zeros((slots, 2), jnp.uint32),
    )
    return _split_slots(made)


def _split_slots(slots: Slots) -> Slots:
    """Split every array over the devices by slots, always: else each change compiles anew."""

    def split(x: jax.Array) -> jax.Array:
        return constrain(x, "rows", *[None] * (x.ndim - 1))

    return Slots(
        cache=slots.cache,  # which has a sharding of its own
        token=split(slots.token),
        position=split(slots.position),
        generated=split(slots.generated),
        done=split(slots.done),
        key=split(slots.key),
    )


def derive_keys(
    seed: int, round: int, prompts: Sequence[int], samples: Sequence[int]
) -> UInt32[Array, "samples 2"]:
    """Return the key data of samples: a function of (seed, round, prompt, sample) alone.

    `prompts` are 64-bit numbers that stand for the prompt ids.
    """
    root = jax.random.fold_in(jax.random.key(seed), round)
    low = jnp.asarray([number & 0xFFFFFFFF for number in prompts], jnp.uint32)
    high = jnp.asarray([number >> 32 for number in prompts], jnp.uint32)
    sample = jnp.asarray(list(samples), jnp.uint32)

    def derive(low: jax.Array, high: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, low), high)
        return jax.random.key_data(jax.random.fold_in(key, sample))

    keys: jax.Array = jax.vmap(derive)(low, high, sample)
    return keys


def admit(
    slots: Slots,
    prompt_keys: Prompts,
    prompt_values: Prompts,
    admission: Admission,
    cancelled: Bool[Rows, " S"],
) -> Slots:
    """Fork prefilled prompts into slots, and idle the slots in `cancelled`.

    The prompt's last token is not in the prefill: feeding it is the slot's first decode step, so
    every response token, the first too, is drawn in one place.
    """

    source, slot = jnp.asarray(admission.source), jnp.asarray(admission.slot)

    def put(old: jax.Array, new: Rows) -> jax.Array:
        return old.at[slot].set(new, mode="drop")

    cache = caches.insert_prompts(slots.cache, prompt_keys, prompt_values, source, slot)
    admitted = Slots(
        cache=cache,
        token=put(slots.token, admission.token),
        position=put(slots.position, admission.position),
        generated=put(slots.generated, jnp.zeros_like(slot)),
        done=put(slots.done | cancelled, jnp.zeros_like(slot, bool)),
        key=put(slots.key, admission.key),
    )
    return _split_slots(admitted)


def select_slots(slots: Slots, kept: Int32[Array, " kept"]) -> Slots:
    """Return the slots of the numbers `kept` alone, in that order."""
    chosen = jax.tree.map(lambda x: x[kept], slots)
    return _split_slots(dataclasses.replace(chosen, cache=caches.constrain_cache(chosen.cache)))


def decode_chunk(
    weights: Params, slots: Slots, settings: DecodeSettings, config: DecoderConfig
) -> tuple[Slots, ChunkOutput]:
    """Advance every slot that is not done by up to `settings.chunk` tokens."""
    output = _start_output(slots, settings, config)

    def advance(step: jax.Array, carry: tuple[Slots, ChunkOutput]) -> tuple[Slots, ChunkOutput]:
        slots, output = carry
        logits, cache = caches.decode_step(
            weights, slots.cache, slots.token, slots.position, config
        )
        live = ~slots.done
        if settings.is_exact:
            exact = draw_exactly(logits, slots.key, slots.generated, settings)
            drawn, logps, entropies = exact[:3]
            output = _note_exact(output, step, live, exact)
        else:
            drawn, logps, entropies = draw_tokens(logits, slots.key, slots.generated, settings)
        output = dataclasses.replace(
            output,
            tokens=output.tokens.at[:, step].set(jnp.where(live, drawn, 0)),
            logps=output.logps.at[:, step].set(jnp.where(live, logps, 0.0)),
            entropies=output.entropies.at[:, step].set(jnp.where(live, entropies, 0.0)),
            count=output.count + live,
        )
        generated = slots.generated + live
        stopped = jnp.isin(drawn, jnp.asarray(settings.stop_ids, jnp.int32))
        done = slots.done | stopped | (generated >= settings.max_tokens)
        slots = dataclasses.replace(
            slots,
            cache=cache,
            token=jnp.where(live, drawn, slots.token),
            position=slots.position + (live & ~done),
            generated=generated,
            done=done,
        )
        return slots, output

    # A fixed number of steps: a condition on the data would have a GPU wait for the host each step.
    slots, output = jax.lax.fori_loop(0, settings.chunk, advance, (slots, output))
    return _split_slots(slots), dataclasses.replace(output, done=slots.done)


def _start_output(slots: Slots, settings: DecodeSettings, config: DecoderConfig) -> ChunkOutput:
    """Return the output of a chunk that has drawn nothing yet."""
    count, kept = len(slots.token), min(settings.max_kept, config.vocab_size)
    zeros = jnp.zeros((count, settings.chunk), jnp.float32)
    return ChunkOutput(
        tokens=jnp.zeros((count, settings.chunk), jnp.int32),
        logps=zeros,
        entropies=zeros,
        count=jnp.zeros((count,), jnp.int32),
        done=slots.done,
        drawn_logps=zeros if settings.is_exact else None,
        kept=jnp.full((count, settings.chunk, kept), -1, jnp.int32) if kept else None,
    )


def _note_exact(
    output: ChunkOutput, step: jax.Array, live: jax.Array, exact: ExactDraws
) -> ChunkOutput:
    assert output.drawn_logps is not None  # `_start_output` has made it
    logps = output.drawn_logps.at[:, step].set(jnp.where(live, exact.drawn_logps, 0.0))
    kept = output.kept
    if kept is not None and exact.kept is not None:
        kept = kept.at[:, step].set(jnp.where(live[:, None], exact.kept, -1))
    return dataclasses.replace(output, drawn_logps=logps, kept=kept)


class InitSlots(Protocol):
    def __call__(self, *, slots: int, length: int) -> Slots: ...


Prefill = Callable[[Params, Rows, Rows], tuple[Prompts, Prompts]]
Admit = Callable[[Slots, Prompts, Prompts, Admission, Rows], Slots]
DecodeChunk = Callable[[Params, Slots], tuple[Slots, ChunkOutput]]
Unstack = Callable[[Params], Params]
SelectSlots = Callable[[Slots, Rows], Slots]


class CompiledDecoder(NamedTuple):
    """The jitted functions of this module and of the cache, for one model and its settings."""

    init_slots: InitSlots
    prefill: Prefill
    admit: Admit
    decode_chunk: DecodeChunk
    unstack: Unstack
    select: SelectSlots


def compile_decoder(
    settings: DecodeSettings, config: DecoderConfig, replicated: NamedSharding
) -> CompiledDecoder:
    """Return the functions that a sampler drives, jitted.

    Args:
      replicated: the sharding of what the host reads.
    """
    return CompiledDecoder(
        init_slots=jax.jit(
            functools.partial(init_slots, config), static_argnames=("slots", "length")
        ),
        prefill=jax.jit(functools.partial(caches.prefill, config=config)),
        admit=jax.jit(admit, donate_argnums=0),
        decode_chunk=jax.jit(
            functools.partial(decode_chunk, settings=settings, config=config),
            donate_argnums=1,
            out_shardings=(None, replicated),
        ),
        unstack=jax.jit(functools.partial(caches.unstack_layers, config=config)),
        # Of other shapes than its input, which cannot be donated.
        select=jax.jit(select_slots),
    )
