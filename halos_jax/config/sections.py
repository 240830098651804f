"""The sections of the configuration: every field with its default and one line of what it says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from halos_jax.config.execution import Execution
from halos_jax.config.kinds import FeedbackType
from halos_jax.config.roles import aside, execution, growing, place, tuning


@dataclasses.dataclass(frozen=True)
class ModelConfig(Execution):
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
    added_tokens_init: Literal["mean", "random"] = "mean"  # of new tokens' embedding and head rows
    pad_vocab_to: int = 1  # a vocabulary that grows does so to a multiple of this


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter on the frozen model of `model.path`."""

    rank: int = 0  # 0: off, all params are trained (HALOs' own: 64)
    alpha: float = 0.0  # the adapter is scaled by alpha / rank; 0: 4 x rank
    dropout: float = 0.05  # of what enters the adapter, in training
    targets: tuple[str, ...] = ("all-linear",)  # or Hugging Face module names: q_proj, ...
    rslora: bool = False  # scale by alpha / sqrt(rank)
    # How the frozen base is held: in `compute_dtype`, or its blocks' linear layers in 8 or 4 bits
    base: Literal["compute", "int8", "nf4"] = "compute"
    # An adapter in PEFT format to start from; rank, alpha, targets and rslora are then its own.
    path: str = place("", "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # A file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow; compressed), a folder of them, a pattern
    # ("DIR/*.jsonl"), a folder of `save_to_disk` or of a data set as "DIR@split", a data set of
    # data/records/hub.py as "name@split", any other of the hub as "id@split" or
    # "id:config@split", or several of these with commas between.
    train: str = place("", "source")
    eval: str = place("", "source")  # the held-out set; empty: no evaluation
    train_split: str = ""  # only records whose field `split` has this value; empty: all
    eval_split: str = ""
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
    # Records: a random subset, fixed by the seed; 0: all
    max_train: int = growing(0, "online", elsewhere="result", zero_is_all=True)
    max_eval: int = 0  # the same subset for every seed
    # Examples to train on over all epochs; 0: train.epochs alone decides
    n_examples: int = growing(0, "sft", "reward_model", "align", zero_is_all=True)
    max_prompt_count: int = 0  # pairs of a prompt; 0: all
    frac_unique_desirable: float = 1.0  # share of the desirable answers to keep ("unpaired" losses)
    frac_unique_undesirable: float = 1.0
    collapse_whitespace: bool = False  # runs of spaces and tabs become one space; spoils code
    learn_turns: Literal["all", "last"] = "all"  # of the assistant, in conversations (SFT)
    # Of feedback SFT learns the best output of each prompt, or every preferred or desirable one.
    learn_outputs: Literal["best", "preferred"] = "best"
    good_token: str = "<|good|>"  # of the loss "csft": what begins a desirable answer
    bad_token: str = "<|bad|>"  # ... and any other

    @property
    def control(self) -> tuple[str, str]:
        """What begins a desirable answer, and any other, of "csft"."""
        return self.good_token, self.bad_token


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    total_prompts: int = growing(2048, "online")
    prompts_per_round: int = 512
    num_skip: int = 0  # prompts to leave out at the start of the order
    # The policy that the loss compares with: the SFT checkpoint, the policy at the start of the
    # round, or the one of 1 to `sync_every` optimizer steps ago.
    reference: Literal["sft", "round_start", "previous_step"] = "sft"
    sync_every: int = 1  # of "previous_step": optimizer steps between two copies of the policy
    export_each: bool = aside(False)  # leave each round's policy in rounds/0003/model


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    num_samples_per_prompt: int = 4
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0  # 0: off
    max_tokens: int = 2048  # of a response
    max_prompt_length: int = 512
    prefix: str = ""  # begins every answer, as a part of the prompt: csft's good token, say
    stop: tuple[str, ...] = ()  # stop strings, besides the end-of-sequence tokens
    slots: int = execution(256)  # sequences decoded side by side, over all devices
    chunk: int = execution(8)  # decode steps between two looks at what has finished
    # Go on with 1/shrink of the slots once no more are busy; 0: never
    shrink: int = execution(2)
    shard_prompts: int = execution(128)  # the unit of durable sampling
    keep_logps: bool = False  # write the token log-probabilities into samples.jsonl
    generator: str = ""  # the policy's name in the records; empty: model.path
    # Of task=sample alone:
    num_prompts: int = 0  # of the run's order, after rounds.num_skip; 0: all
    round: int = 1  # draw what this round of an online run would draw
    best_of: bool = False  # keep of a prompt's samples the one with the highest reward
    format: Literal["samples", "alpacaeval"] = "samples"
    output: str = place("", "path")  # file of the result; empty: in the workdir


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    type: FeedbackType = "pairwise"
    mode: Literal["random", "max", "min", "all"] = "max"  # of "pairwise"
    # Of "pairwise" a pair's rewards differ by more than this (mode "min": by as much); of "binary"
    # it is the least reward that is desirable, or an average of them: rewards equal to that go into
    # the class that makes both more even. "auto" is 0 for the former, "median" for the latter.
    threshold: float | Literal["auto", "mean", "median"] = "auto"
    scope: Literal["file", "prompt"] = "file"  # of which rewards "binary" takes mean or median


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = "adamw"
    # The peak. 2e-6 is what preference losses on all weights took well: see configs/online_dpo.py.
    learning_rate: float = tuning(2e-6)
    beta1: float = tuning(0.9)
    beta2: float = tuning(0.999)
    eps: float = tuning(1e-8)
    weight_decay: float = tuning(0.01)  # of matrices; HALOs', torch's own, decays all params alike
    decay_biases: bool = tuning(True)  # ... and of biases
    decay_norms: bool = tuning(False)  # ... and of the scales and biases of norms
    max_grad_norm: float = tuning(1.0)
    value_max_grad_norm: float = tuning(0.1)  # of a value head (PPO), which is clipped by itself
    schedule: Literal["constant", "linear", "cosine", "wsd"] = tuning("constant")
    decay_fraction: float = tuning(0.2)  # of "wsd": share of the steps that decay
    warmup_fraction: float = tuning(0.1)
    warmup_steps: int = tuning(-1)  # -1: warmup_fraction of the expected steps
    warmup_start: float = tuning(0.1)  # first learning rate, as a fraction of the peak
    moments_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # Examples (pairs, answers, groups, conversations) per optimizer step: n of them make
    # max(1, round(n / batch_size)) steps of equal size, or one more or less in each.
    batch_size: int = 32
    max_length: int = 1250  # prompt + response; a longer response is cut
    epochs: int = growing(1, "online", "sft", "reward_model", "align")
    # Optimizer steps between evaluations; 0: only at start and end
    eval_every: int = aside(32)
    # Optimizer steps between console lines; metrics.jsonl has every step
    log_every: int = aside(1)
    # Largest packed row; longer batches become microbatches
    tokens_per_device: int = execution(16384)
    ema_decay: float = 0.0  # of a moving average of the policy, to evaluate and export; 0: none
    row_multiple: int = execution(128)  # row lengths are rounded up to a multiple of this
    mask_truncated: bool = False  # no loss on a response that was cut by a token limit


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = execution(-1)  # -1 (one axis at most): all devices that the other axes leave
    fsdp: int = execution(1)
    tensor: int = execution(1)
    # Join the other processes of the job (TPU VMs, SLURM, GKE)
    distributed: bool = execution(False)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    keep: int = aside(1)  # round checkpoints kept
    every: int = aside(0)  # optimizer steps between checkpoints inside a stage; 0: at its end


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
    num_sft: int = 6000
    num_pairs: int = 6000
    num_prompts: int = 2048
    num_eval: int = 128
    mistakes: float = 0.5  # share of the demonstrations that are wrong on purpose
    alphabet: str = "abcdefghij"
    min_letters: int = 4  # of a prompt
    max_letters: int = 6


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    cases: tuple[str, ...] = ()  # see halos_jax/bench/workloads.py
    steps: int = 10  # timed steps of a training or scoring case
    examples: int = 0  # of a step, or prompts that are sampled; 0: the case's own
    tiny: bool = False  # everything at a size for a CPU


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Several tasks as one run; see `expand_pipeline`."""

    tasks: tuple[str, ...] = ()  # run one after the other, each in workdir/<task>
    # task -> section -> field -> value; "{workdir}" in a string is the pipeline's workdir
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
