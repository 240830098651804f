"""The sections of the configuration: every field with its default, its bounds and what it says.

The comment above a field, or beside it, is its documentation, which `--help` shows: see `docs`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge

from halos_jax.config.bounds import (
    Fraction,
    FractionAboveZero,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from halos_jax.config.execution import Execution
from halos_jax.config.kinds import FeedbackType
from halos_jax.config.roles import aside, execution, growing, place, tuning


@dataclasses.dataclass(frozen=True)
class ModelConfig(Execution):
    """The policy: where it comes from, its tokenizer, and how it is run."""

    # Folder or hub id in Hugging Face format, or the workdir of a run
    path: str = place("", "model")
    # Which of a workdir's checkpoints sample, eval and export take; "auto": final/, else the newest
    checkpoint: int | Literal["auto"] = "auto"
    tokenizer: str = place("", "model")  # folder or hub id; empty: the model's own
    # Jinja file, or the name of one of the tokenizer's templates; empty: its default, else ChatML
    chat_template: str = place("", "path")
    # What the template is given besides the conversation: enable_thinking, tools, date_string, ...
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random_init: bool = False  # take only the architecture from `path`, draw the weights
    # Tokens for the tokenizer to have, new ones or not: tokens in answers, and special ones where
    # the chat template has them; of csft, data.good_token and data.bad_token are special, too
    added_tokens: tuple[str, ...] = ()
    added_tokens_init: Literal["mean", "random"] = "mean"  # new tokens' embedding and head rows
    pad_vocab_to: PositiveInt = 1  # a vocabulary that grows does so to a multiple of this


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter on the frozen model of `model.path`."""

    rank: NonNegativeInt = 0  # 0: off, all params are trained (HALOs' own: 64)
    alpha: NonNegativeFloat = 0.0  # the adapter is scaled by alpha / rank; 0: 4 x rank
    dropout: FractionBelowOne = 0.05  # of what enters the adapter, in training
    targets: tuple[str, ...] = ("all-linear",)  # or Hugging Face module names: q_proj, ...
    rslora: bool = False  # scale by alpha / sqrt(rank)
    # How the frozen base is held: in `compute_dtype`, or its blocks' linear layers in 8 or 4 bits
    base: Literal["compute", "int8", "nf4"] = "compute"
    # An adapter in PEFT format to start from; rank, alpha, targets and rslora are then its own.
    path: str = place("", "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The records: where they are, what is taken of them, and what is added to them."""

    # A file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow; compressed), a folder of them, a pattern
    # ("DIR/*.jsonl"), a folder of `save_to_disk` or of a data set as "DIR@split", a data set of
    # data/records/hub.py as "name@split", any other of the hub as "id@split" or
    # "id:config@split", or several of these with commas between.
    train: str = place("", "source")
    eval: str = place("", "source")  # the held-out set; empty: no evaluation
    # Take only records of `train` whose field `split` has this value; empty: all
    train_split: str = ""
    eval_split: str = ""  # the same of the records of `eval`

    # What is added to the records of `train` and `eval`, in this order:

    map: str = ""  # "package.module:function": a record -> a record, or None to leave it out
    fields: str = ""  # "prompt=problem,completion=solution": our name=the records' name
    prompt_template: str = ""  # "Solve: {question}": the user's turn, made of the record's fields
    system_prompt: str = ""  # put before every conversation that has no system turn
    # Join system turns to the user's next one, and neighbours of one role, as templates want that
    # refuse system turns or let users and assistants alternate.
    merge_turns: bool = False
    skip_bad: bool = False  # leave out bad records, counted, instead of ending with the first one
    ignore_fields: str = ""  # "id,meta": fields, and keys of turns, left unread on purpose
    # Training records: a random subset, fixed by the seed; 0: all
    max_train: NonNegativeInt = growing(0, "online", elsewhere="result", zero_is_all=True)
    max_eval: NonNegativeInt = 0  # held-out records: the same subset for every seed; 0: all
    # Examples to train on over all epochs; 0: train.epochs alone decides
    n_examples: NonNegativeInt = growing(0, "sft", "reward_model", "align", zero_is_all=True)
    max_prompt_count: NonNegativeInt = 0  # pairs of a prompt; 0: all
    frac_unique_desirable: Fraction = 1.0  # desirable answers to keep, for "unpaired" losses
    frac_unique_undesirable: Fraction = 1.0  # undesirable answers to keep, for the same losses
    collapse_whitespace: bool = False  # runs of spaces and tabs become one space; spoils code
    learn_turns: Literal["all", "last"] = "all"  # of the assistant, in conversations (SFT)
    # Of feedback SFT learns the best output of each prompt, or every preferred or desirable one.
    learn_outputs: Literal["best", "preferred"] = "best"
    good_token: str = "<|good|>"  # of the loss "csft": what begins a desirable answer
    bad_token: str = "<|bad|>"  # of the loss "csft": what begins any other answer

    @property
    def control(self) -> tuple[str, str]:
        """What begins a desirable answer, and any other, of "csft"."""
        return self.good_token, self.bad_token


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """Of task=online: how many prompts it uses, and what the loss compares with."""

    total_prompts: PositiveInt = growing(2048, "online")  # prompts of the whole run
    prompts_per_round: PositiveInt = 512  # prompts that a round samples completions of
    num_skip: NonNegativeInt = 0  # prompts to leave out at the start of the order
    # The policy that the loss compares with: the SFT checkpoint, the policy at the start of the
    # round, or the one of 1 to `sync_every` optimizer steps ago.
    reference: Literal["sft", "round_start", "previous_step"] = "sft"
    # Of the reference "previous_step": optimizer steps between two copies of the policy
    sync_every: PositiveInt = 1
    export_each: bool = aside(False)  # leave each round's policy in rounds/0003/model


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled, and what becomes of them in task=sample."""

    num_samples_per_prompt: PositiveInt = 4  # completions of each prompt
    temperature: NonNegativeFloat = 0.7  # logits are divided by it; 0: greedy
    top_p: FractionAboveZero = 0.95  # sample of the likeliest tokens of this probability; 1: of all
    top_k: NonNegativeInt = 0  # sample of so many likeliest tokens; 0: off
    max_tokens: PositiveInt = 2048  # of a response
    max_prompt_length: PositiveInt = 512  # tokens of a prompt; a longer one is cut
    prefix: str = ""  # begins every answer, as a part of the prompt: csft's good token, say
    stop: tuple[str, ...] = ()  # stop strings, besides the end-of-sequence tokens
    slots: PositiveInt = execution(256)  # sequences decoded side by side, over all devices
    chunk: PositiveInt = execution(8)  # decode steps between two looks at what has finished
    # Go on with 1/shrink of the slots once no more are busy; 0: never
    shrink: int = execution(2)
    shard_prompts: PositiveInt = execution(128)  # prompts of the unit of durable sampling
    keep_logps: bool = False  # write the token log-probabilities into samples.jsonl
    generator: str = ""  # the policy's name in the records; empty: model.path

    # Of task=sample alone:

    # Prompts of the run's order, after rounds.num_skip; 0: all
    num_prompts: NonNegativeInt = 0
    round: NonNegativeInt = 1  # draw what this round of an online run would draw
    best_of: bool = False  # keep of a prompt's samples the one with the highest reward
    # Records of this package, or what alpaca_eval reads
    format: Literal["samples", "alpacaeval"] = "samples"
    output: str = place("", "path")  # file of the result; empty: in the workdir


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """What the rewards of a round's samples are turned into, for the loss to train on."""

    # Pairs of a better and a worse sample, samples that are desirable or not, or their rewards
    type: FeedbackType = "pairwise"
    # Of "pairwise": shuffled neighbours, the best and the worst, the closest ones, or every pair
    mode: Literal["random", "max", "min", "all"] = "max"
    # Of "pairwise" a pair's rewards differ by more than this (mode "min": by as much); of "binary"
    # it is the least reward that is desirable, or an average of them: rewards equal to that go into
    # the class that makes both more even. "auto" is 0 for the former, "median" for the latter.
    threshold: float | Literal["auto", "mean", "median"] = "auto"
    scope: Literal["file", "prompt"] = "file"  # of which rewards "binary" takes mean or median


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate."""

    # Which one; all but "sgd" keep moments, "adafactor" factored ones
    name: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = "adamw"
    # The peak. 2e-6 is what preference losses on all weights took well: see configs/online_dpo.py.
    learning_rate: PositiveFloat = tuning(2e-6)
    beta1: FractionBelowOne = tuning(0.9)  # decay of the first moment
    beta2: FractionBelowOne = tuning(0.999)  # decay of the second moment
    eps: PositiveFloat = tuning(1e-8)  # added to the root of the second moment
    # Decay of matrices; HALOs', torch's own, decays all params alike
    weight_decay: NonNegativeFloat = tuning(0.01)
    decay_biases: bool = tuning(True)  # decay biases, too
    decay_norms: bool = tuning(False)  # decay the scales and biases of norms, too
    max_grad_norm: PositiveFloat = tuning(1.0)  # a longer gradient is scaled down to this norm
    # Of a value head (PPO), which is clipped by itself
    value_max_grad_norm: PositiveFloat = tuning(0.1)
    # The learning rate's course after the warm-up; "wsd" is constant, then decays
    schedule: Literal["constant", "linear", "cosine", "wsd"] = tuning("constant")
    decay_fraction: Fraction = tuning(0.2)  # of "wsd": share of the steps that decay
    warmup_fraction: Fraction = tuning(0.1)  # share of the expected steps that warm up
    # Steps that warm up; -1: warmup_fraction of the expected steps
    warmup_steps: Annotated[int, Ge(-1)] = tuning(-1)
    warmup_start: Fraction = tuning(0.1)  # first learning rate, as a fraction of the peak
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  # how the moments are held


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batches, lengths and epochs of training."""

    # Examples (pairs, answers, groups, conversations) per optimizer step: n of them make
    # max(1, round(n / batch_size)) steps of equal size, or one more or less in each.
    batch_size: PositiveInt = 32
    max_length: PositiveInt = 1250  # prompt + response; a longer response is cut
    # Passes over the examples, of an online run over those of each round
    epochs: PositiveInt = growing(1, "online", "sft", "reward_model", "align")
    # Optimizer steps between evaluations; 0: only at start and end
    eval_every: NonNegativeInt = aside(32)
    # Optimizer steps between console lines; metrics.jsonl has every step
    log_every: PositiveInt = aside(1)
    # Largest packed row; longer batches become microbatches
    tokens_per_device: PositiveInt = execution(16384)
    # Of a moving average of the policy, to evaluate and export; 0: none
    ema_decay: FractionBelowOne = 0.0
    row_multiple: PositiveInt = execution(128)  # row lengths are rounded up to a multiple of this
    mask_truncated: bool = False  # no loss on a response that was cut by a token limit


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has."""

    # Devices over which batches are split; -1 (one axis at most): all that the other axes leave
    data: int = execution(-1)
    fsdp: int = execution(1)  # devices over which batches and params are split
    tensor: int = execution(1)  # devices over which heads, hidden layers and the vocabulary are
    # Join the other processes of the job (TPU VMs, SLURM, GKE)
    distributed: bool = execution(False)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and what is kept."""

    keep: PositiveInt = aside(1)  # round checkpoints kept
    # Optimizer steps between checkpoints inside a stage; 0: at its end
    every: NonNegativeInt = aside(0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Of task=eval: what `data.eval` holds and is used for."""

    # "samples": prompts, to be answered and scored; "feedback": what the loss is computed on
    on: Literal["samples", "feedback"] = "samples"
    # Of the loss; empty: the model that the run at model.path started from
    reference: str = place("", "model")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Of task=export: what becomes of the policy at `model.path`."""

    output: str = place("", "path")  # folder; empty: final/ in the workdir
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # "auto": that of the params


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Of task=toy_data: sorting letters, with prompts that all differ."""

    num_sft: PositiveInt = 6000  # demonstrations for SFT
    num_pairs: NonNegativeInt = 6000  # pairs for a reward model
    num_prompts: NonNegativeInt = 2048  # prompts for an online run
    num_eval: PositiveInt = 128  # held-out prompts
    mistakes: Fraction = 0.5  # share of the demonstrations that are wrong on purpose
    alphabet: str = "abcdefghij"  # the letters of prompts, each of them once
    min_letters: PositiveInt = 4  # of a prompt
    max_letters: int = 6  # of a prompt


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Of task=bench: what is timed."""

    cases: tuple[str, ...] = ()  # see halos_jax/bench/workloads.py
    steps: PositiveInt = 10  # timed steps of a training or scoring case
    # Examples of a step, or prompts that are sampled; 0: the case's own
    examples: NonNegativeInt = 0
    tiny: bool = False  # everything at a size for a CPU


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Several tasks as one run; see `expand_pipeline`."""

    tasks: tuple[str, ...] = ()  # run one after the other, each in workdir/<task>
    # task -> section -> field -> value; "{workdir}" in a string is the pipeline's workdir
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
