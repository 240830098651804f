"""Every record and pytree that one stage of a run hands to another.

Two kinds of types live here. *Records* (plain frozen dataclasses) are in files and on the host:
prompts, samples, feedback, training items. *Pytrees* (`flax.struct.dataclass`) enter compiled
functions: the packed training batch and the train state.

Shape legend for the whole package. Axes of rows and of sequences are spelled out,
`f32[rows, sequences]`; a letter means the same thing everywhere:

    B  attention's batch               L  layers           V  vocabulary
    T  tokens of a row                 D  model            R  LoRA rank
    P  response positions of a row     F  mlp              E  experts
    M  entries of the attention view   N  query heads      S  slots of the sampler
    m  microbatches of a step          K  key/value heads  C  cache length (visible keys)
                                       H  head dimension

The tests check the annotations at run time, at every call and for every record (`shapes.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from halos_jax.drawn import Drawn

# Batches are built on the host as NumPy arrays; from then on they are JAX arrays or tracers.
if TYPE_CHECKING:
    Array: TypeAlias = jax.Array
else:
    Array = jax.Array | np.ndarray

# A model's weights: nested dicts of arrays, in which those of all layers are stacked, `[L, ...]`.
Params: TypeAlias = dict[str, Any]
# A pytree of arrays whose structure only its maker knows, such as the state of an optimizer.
Tree: TypeAlias = Any

# Roles of a sequence in a batch (`Sequences.role`).
PADDING, TARGET, CHOSEN, REJECTED, MISMATCHED, MEMBER = range(6)

FINISH_STOP, FINISH_LENGTH = "stop", "length"


# --------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    `further` holds everything else in it (tool calls, a name, reasoning, and in the first turn what
    applies to the whole conversation) as JSON text, which keeps turns hashable
    (`data/records/turns.py`). `learned` is false for an answer that is context only, not a target.

    Example:
      >>> question = Turn("user", "What is 2 + 2?")
      >>> question.role, question.learned
      ('user', True)
    """

    role: str
    content: str
    further: str = ""
    learned: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a turn to be answered.

    `prompt_id` identifies the prompt in the whole run: from the second pass over the data on, it
    ends in the `pass_number` ("7#2"). `extra` holds the record's other fields, such as a reference
    answer, for reward functions. `place` is the record's file and line, for error messages.

    Example:
      >>> prompt = Prompt("7", (Turn("user", "What is 2 + 2?"),), {"answer": "4"}, "math.jsonl:8")
      >>> prompt.extra["answer"]
      '4'
    """

    prompt_id: str
    turns: tuple[Turn, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = dataclasses.field(default="", compare=False)
    pass_number: int = 1

    @property
    def key(self) -> tuple[str, tuple[Turn, ...]]:
        """The prompt's identity across files, which may use the same prompt ids (HALOs' do)."""
        return self.prompt_id, self.turns


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One response drawn by the policy, with the exact tokens that the policy saw and produced.

    If `finish_reason` is "stop", `response_ids` includes the end-of-sequence token; a response cut
    by the token limit ("length") has no end marker. `logps` are the policy's log-probabilities
    (nats, temperature 1, unfiltered) of `response_ids`, if they were kept. `sum_logps` is their
    sum and `mean_entropy` (nats a token) the mean entropy of the distributions that the tokens are
    of; None in records that lack them. `drawn` says what the tokens were drawn from, if that was
    kept and is not the policy itself.

    Example:
      >>> prompt = Prompt("7", (Turn("user", "What is 2 + 2?"),))
      >>> sample = Sample(
      ...     prompt,
      ...     sample_id=0,
      ...     output="4",
      ...     prompt_ids=(5, 17, 6),
      ...     response_ids=(23, 2),  # "4" and the end-of-sequence token
      ...     finish_reason=FINISH_STOP,
      ...     reward=1.0,
      ...     logps=(-0.25, -0.01),
      ... )
      >>> len(sample.logps) == len(sample.response_ids)
      True
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
    sum_logps: float | None = None
    mean_entropy: float | None = None
    drawn: Drawn | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One response inside a feedback record; `ids` is empty for feedback that came as text.

    Example:
      >>> good = Completion((Turn("assistant", "4"),), ids=(23, 2), reward=1.0, sample_id=0)
      >>> good.finish_reason
      'stop'
    """

    turns: tuple[Turn, ...]
    ids: tuple[int, ...] = ()
    reward: float | None = None
    sample_id: int | None = None
    finish_reason: str = FINISH_STOP
    logps: tuple[float, ...] | None = None  # of `ids`, as those of a sample


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """A pair: two completions of one prompt, the chosen one and the rejected one.

    `weight` is that of the pair in the loss, more than 0.

    Example:
      >>> pair = Preference(
      ...     Prompt("7", (Turn("user", "What is 2 + 2?"),)),
      ...     chosen=Completion((Turn("assistant", "4"),), reward=1.0),
      ...     rejected=Completion((Turn("assistant", "5"),), reward=0.0),
      ... )
      >>> pair.chosen.reward - pair.rejected.reward
      1.0
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    prompt_ids: tuple[int, ...] = ()
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """A completion of a prompt, and whether it is desirable.

    Example:
      >>> judged = Judgement(
      ...     Prompt("7", (Turn("user", "What is 2 + 2?"),)),
      ...     Completion((Turn("assistant", "5"),)),
      ...     desirable=False,
      ... )
      >>> judged.completion.turns[-1].content
      '5'
    """

    prompt: Prompt
    completion: Completion
    desirable: bool
    prompt_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with the answer to learn.

    In a conversation, `completion.turns` holds all turns after the prompt; the assistant's are
    learned, and the others are context.

    Example:
      >>> shown = Demonstration(
      ...     Prompt("7", (Turn("user", "What is 2 + 2?"),)),
      ...     Completion(
      ...         (Turn("assistant", "4"), Turn("user", "And 3 + 3?"), Turn("assistant", "6"))
      ...     ),
      ... )
      >>> [turn.content for turn in shown.completion.turns if turn.role == "assistant"]
      ['4', '6']
    """

    prompt: Prompt
    completion: Completion
    prompt_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """The unit of packing: one prompt and the responses that must share its row.

    A supervised example has one response, a pair two, a group n; `roles` has the role of each.
    `old_logps` are the log-probabilities (nats) under which the responses were sampled, and `drawn`
    the distributions that these belong to, where they are not the policy's own. `masks` mark the
    response tokens that are targets; a user's turns inside a conversation are not. A response
    without targets counts as a member of its group but has no part in the loss.

    Example:
      >>> pair = Item(
      ...     np.array([5, 17, 6]), (np.array([23, 2]), np.array([24, 2])), (CHOSEN, REJECTED)
      ... )
      >>> pair.num_targets, pair.num_tokens
      ((2, 2), 7)
    """

    prompt_ids: Int[np.ndarray, " prompt"]
    responses: tuple[Int[np.ndarray, " _"], ...]
    roles: tuple[int, ...]
    rewards: tuple[float, ...] = ()
    weight: float = 1.0
    desirable: bool = True
    old_logps: tuple[Float32[np.ndarray, " _"], ...] = ()  # empty if unknown
    masks: tuple[Bool[np.ndarray, " _"], ...] = ()  # empty if every token is a target
    drawn: tuple[Drawn, ...] = ()  # empty: from the policy itself, or unknown

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

    The entries of all sequences of a row are concatenated, bucket by bucket: `buckets` is a static
    tuple of (sequences, length), and M = sum of sequences * length.

    Example: a pair of a prompt of one token, 5, and the answers 6 and 7: the row `[5, 6, 7]`.
      >>> view = View(
      ...     indices=np.array([[0, 1, 0, 2]], np.int32),  # 5 6 and 5 7
      ...     inverse=np.array([[[0, 1, 3], [2, 4, 4]]], np.int32),  # 5 is in entries 0 and 2
      ...     owner=np.array([[0, 1, 3]], np.int32),
      ...     owned=np.array([[0, 1, 3, 2]], np.int32),  # entry 2 owns nothing: 5 is entry 0's
      ...     lengths=np.array([[2, 2]], np.int32),
      ...     buckets=((2, 2),),
      ... )
      >>> np.array([5, 6, 7])[view.indices[0]].tolist()
      [5, 6, 5, 7]
    """

    indices: Int32[Array, "*m rows M"]  # the token in each entry; T if the entry is padding
    inverse: Int32[Array, "*m rows copies T"]  # the entries that hold a token, filled up with M
    owner: Int32[Array, "*m rows T"]  # the entry whose output becomes the token's; M if none
    owned: Int32[Array, "*m rows M"]  # the token that an entry owns; T if none
    lengths: Int32[Array, "*m rows sequences"]  # tokens of each sequence; 0 if it is padding
    buckets: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)


@struct.dataclass
class Sequences:
    """The properties of each virtual sequence of a row.

    Example: the pair of `View`.
      >>> sequences = Sequences(
      ...     role=np.array([[CHOSEN, REJECTED]], np.int32),
      ...     partner=np.array([[1, 0]], np.int32),
      ...     group=np.array([[0, 0]], np.int32),
      ...     last=np.array([[1, 2]], np.int32),
      ...     reward=np.array([[1.0, 0.0]], np.float32),
      ...     weight=np.array([[1.0, 1.0]], np.float32),
      ...     desirable=np.array([[True, True]]),
      ... )
      >>> np.take_along_axis(sequences.reward, sequences.partner, axis=-1).tolist()
      [[0.0, 1.0]]
    """

    role: Int32[Array, "*m rows sequences"]  # one of the role constants
    partner: Int32[Array, "*m rows sequences"]  # the other sequence of a pair, else itself
    group: Int32[Array, "*m rows sequences"]  # number of the sequence's item within the row
    last: Int32[Array, "*m rows sequences"]  # index in the row of the sequence's last token
    reward: Float32[Array, "*m rows sequences"]
    weight: Float32[Array, "*m rows sequences"]  # of its item; 0 if it is padding
    desirable: Bool[Array, "*m rows sequences"]  # of its item; False if it is padding


@struct.dataclass
class Transform:
    """What the logits at response positions go through before their softmax, as in the sampler.

    A log-probability is that of softmax(logits / temperature) over the kept tokens, or without sets
    over all tokens that there are (a row of the vocabulary may have none).

    Example: the pair of `View`, drawn at temperature 0.7, the 6 from {6, 7} and the 7 for sure.
      >>> transform = Transform(
      ...     temperature=np.array([[0.7, 0.7]], np.float32),
      ...     kept=np.array([[[6, 7], [7, -1]]], np.int32),
      ... )
      >>> (transform.kept >= 0).sum(axis=-1).tolist()
      [[2, 1]]
    """

    temperature: Float32[Array, "*m rows P"]  # 1 at padding
    kept: Int32[Array, "*m rows P kept"] | None = None  # ids, filled up with -1


@struct.dataclass
class Batch:
    """Packed rows of whole items: one batch type for all losses.

    The batch of a step has its microbatches as the leading axis m; a loss sees one of them.

    Example: a pair of a prompt of one token, 5, and the answers 6 and 7, both predicted by it.
      >>> from halos_jax.packing.batches import build_batch, plan_batches
      >>> pair = Item(np.array([5]), (np.array([6]), np.array([7])), (CHOSEN, REJECTED))
      >>> plan = plan_batches([pair], batch_size=1, num_rows=1, tokens_per_row=8, row_multiple=1)
      >>> batch = jax.tree.map(lambda array: array[0], build_batch([pair], plan, 0))
      >>> batch.tokens.tolist(), batch.positions.tolist()
      ([[5, 6, 7]], [[0, 1, 1]])
      >>> [array[batch.is_response].tolist() for array in (batch.source, batch.target)]
      [[0, 0], [6, 7]]
    """

    tokens: Int32[Array, "*m rows T"]
    positions: Int32[Array, "*m rows T"]  # position in the sequence, for RoPE
    view: View
    source: Int32[Array, "*m rows P"]  # token whose hidden state predicts the target
    target: Int32[Array, "*m rows P"]
    sequence: Int32[Array, "*m rows P"]  # index of the target's sequence; their number at padding
    reference_logps: Float32[Array, "*m rows P"]  # zeros if there is no reference
    old_logps: Float32[Array, "*m rows P"]  # of the policy that sampled; else the reference's
    sequences: Sequences
    num_examples: Float32[Array, "*m"]  # total item weight of the whole optimizer step
    num_tokens: Float32[Array, "*m"]  # response tokens (targets) of the whole optimizer step
    proximal_logps: Float32[Array, "*m rows P"] | None = None  # of the policy at a round's start
    # For training with a value head; else None.
    old_values: Float32[Array, "*m rows P"] | None = None  # values when the items were collected
    noise: UInt32[Array, "*m rows P"] | None = None  # random bits for each token's dropout
    # Share of the run's prompts that are used before the step, where the learning rate follows it
    progress: Float32[Array, "*m"] | None = None
    # What the sampler drew from, where that is not the policy itself: all log-probabilities of the
    # batch, the reference's too, are those after it
    transform: Transform | None = None

    @property
    def is_response(self) -> Bool[Array, "*m rows P"]:
        """Whether each response position is real; False at padding."""
        return self.sequence < self.sequences.role.shape[-1]


@struct.dataclass
class TrainState:
    """The state of training that goes from step to step and from round to round.

    `params` are the trained params: a nested dict of the policy's arrays, with those of a value
    head, if the loss has one, under "value".

    Example:
      >>> params = {"embed": np.zeros((97, 8), np.float32)}
      >>> state = TrainState(np.zeros((), np.int32), params, opt_state=())
      >>> jax.tree.map(np.shape, state.params)
      {'embed': (97, 8)}
    """

    step: Int32[Array, ""]  # optimizer steps taken
    params: Params
    opt_state: Tree
    reference: Params | None = None  # the policy of some steps ago, if that is the reference
    ema: Params | None = None  # moving average of the policy, f32
