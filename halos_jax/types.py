"""Every record and pytree that crosses a stage of the pipeline.

Two kinds of types live here. *Records* (plain frozen dataclasses) are what stands in files and on
the host: prompts, samples, feedback, training items. *Pytrees* (`flax.struct.dataclass`) are what
enters a compiled function: the packed training batch and the train state.

Shape legend, used all over the package: B batch, T tokens of a row, N sequences of a row,
P response positions of a row, M attention-view slots of a row, S sampler slots or cache length,
L layers, D model, F mlp, N/K query/kv heads (in weights), H head dimension, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import struct

# Roles of a sequence in a batch (`Sequences.role`).
PADDING, TARGET, CHOSEN, REJECTED, MISMATCHED, MEMBER = range(6)

FINISH_STOP, FINISH_LENGTH = "stop", "length"


# --------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    `further` holds what else it says (calls of tools, a name, its reasoning, and what the first
    turn says for all of them) as JSON text, so that turns stay hashable (`data/records/turns.py`).
    `learned` is false for an answer that is only read.
    """

    role: str
    content: str
    further: str = ""
    learned: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a turn to be answered.

    `prompt_id` names the prompt for the whole run; `extra` holds the record's other fields (a
    reference answer, say), which reward functions may ask for. `place` says for errors where the
    record stands.
    """

    prompt_id: str
    turns: tuple[Turn, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> tuple[str, tuple[Turn, ...]]:
        """What tells prompts of several files apart, which may number theirs alike (HALOs' do)."""
        return self.prompt_id, self.turns


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion, with the exact tokens that the policy saw and produced.

    `response_ids` keeps the end-of-sequence token where `finish_reason` is "stop"; a response cut
    by the token limit ("length") carries no end marker. `logps` are the policy's log-probabilities
    (nats, temperature 1, unfiltered) of `response_ids`, where they were kept.
    """

    prompt: Prompt
    sample_id: int
    output: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str
    generator: str = ""
    reward: float | None = None
    logps: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One answer inside a feedback record; `ids` is empty for feedback that came as text."""

    turns: tuple[Turn, ...]
    ids: tuple[int, ...] = ()
    reward: float | None = None
    sample_id: int | None = None
    finish_reason: str = FINISH_STOP


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """A pair of completions of one prompt of which the first is preferred."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    prompt_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """A completion of a prompt, and whether it is desirable."""

    prompt: Prompt
    completion: Completion
    desirable: bool
    prompt_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt, and what the assistant should answer to it.

    A conversation goes on in `completion.turns`, of which the assistant's are learned and the
    others are only read.
    """

    prompt: Prompt
    completion: Completion
    prompt_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """The unit of packing: one prompt and the completions that must share its row.

    A supervised example has one response, a pair two, a group n. `roles` says what each is.
    `old_logps` are the log-probabilities (nats) under which the responses were sampled. `masks`
    say which tokens of the responses are targets: not those of the user inside of a conversation,
    say. A response without any counts as a member of its group, but not in the loss.
    """

    prompt_ids: np.ndarray  # i32[prompt]
    responses: tuple[np.ndarray, ...]  # i32[response] each
    roles: tuple[int, ...]
    rewards: tuple[float, ...] = ()
    weight: float = 1.0
    desirable: bool = True
    old_logps: tuple[np.ndarray, ...] = ()  # f32[response] each; empty where they are unknown
    masks: tuple[np.ndarray, ...] = ()  # bool[response] each; empty where every token is a target

    @property
    def num_targets(self) -> tuple[int, ...]:
        """How many tokens of each response are targets."""
        return tuple(int(mask.sum()) for mask in self.masks) or tuple(map(len, self.responses))

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(response) for response in self.responses)


# --------------------------------------------------------------------------- pytrees


@struct.dataclass
class View:
    """How attention sees a packed row: virtual sequences as indices into the row's tokens.

    The slots of all sequences of a row stand one behind the other, bucket by bucket: `buckets` is
    a static tuple of (sequences, length), and M = sum of sequences * length.
    """

    indices: jax.Array  # i32[rows, M]: token behind a slot; T where the slot is padding
    inverse: jax.Array  # i32[rows, copies, T]: slots in which a token sits; M where fewer
    owner: jax.Array  # i32[rows, T]: the slot whose output becomes the token's; M if none
    owned: jax.Array  # i32[rows, M]: the token that a slot owns; T where none
    lengths: jax.Array  # i32[rows, N]: tokens of each sequence; 0 where the sequence is padding
    buckets: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)


@struct.dataclass
class Sequences:
    """What is known of each virtual sequence of a row; every array is [rows, N]."""

    role: jax.Array  # i32, one of the role constants
    partner: jax.Array  # i32, the other sequence of a pair (itself where there is none)
    group: jax.Array  # i32, number of the sequence's item within the row
    last: jax.Array  # i32, index in the row of the sequence's last token
    reward: jax.Array  # f32
    weight: jax.Array  # f32, 0 where the sequence is padding
    desirable: jax.Array  # bool, of the sequence's item; False where the sequence is padding


@struct.dataclass
class Batch:
    """Packed rows of whole items: the one batch type of every objective (shapes without the
    leading microbatch axis)."""

    tokens: jax.Array  # i32[rows, T]
    positions: jax.Array  # i32[rows, T], what RoPE sees
    view: View
    source: jax.Array  # i32[rows, P], token whose hidden state predicts the target
    target: jax.Array  # i32[rows, P]
    sequence: jax.Array  # i32[rows, P], the target's sequence; N where the position is padding
    reference_logps: jax.Array  # f32[rows, P], zeros where there is no reference
    old_logps: jax.Array  # f32[rows, P], of the policy that sampled, else the reference's
    sequences: Sequences
    num_examples: jax.Array  # f32[], total item weight of the whole optimizer step
    num_tokens: jax.Array  # f32[], response tokens (targets) of the whole optimizer step
    # Of losses with a value head, in training; else None.
    old_values: jax.Array | None = None  # f32[rows, P], when the answers were collected
    noise: jax.Array | None = None  # u32[rows, P], what the dropout of a token is drawn from


@struct.dataclass
class TrainState:
    """What a training run carries from step to step and from round to round.

    `params` is what is trained: a nested dict of arrays, the policy's and, of a loss with a value
    head, that one's under "value".
    """

    step: jax.Array  # i32[], optimizer steps taken
    params: Any
    opt_state: Any
    reference: Any = None  # the policy of some steps ago, where it is the reference
    ema: Any = None  # the policy's moving average, f32
