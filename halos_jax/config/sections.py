"""The sections of the configuration: every field with its default, its bounds and a comment.

The comment above or beside a field is its documentation, which `--help` shows: see `docs`.
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
from halos_jax.config.rewards import ScorerConfig
from halos_jax.config.roles import aside, execution, growing, place, result_in, tuning


@dataclasses.dataclass(frozen=True)
class ModelConfig(Execution):
    """The policy: where it comes from, its tokenizer, and how it is run."""

    # Folder or hub id in Hugging Face format, or the workdir of a run
    path: str = place("", "model")
    # Checkpoint of a workdir that sample, eval and export load; "auto": final/, else the newest
    checkpoint: int | Literal["auto"] = "auto"
    tokenizer: str = place("", "model")  # folder or hub id; empty: the model's own
    # Jinja file, or name of one of the tokenizer's templates; empty: its default one, else ChatML
    chat_template: str = place("", "path")
    # Variables for the template besides the conversation: enable_thinking, tools, date_string, ...
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The teacher of loss gkd: folder or hub id, or the workdir of a run; with the same tokenizer
    teacher: str = place("", "model")
    # Reference of the loss in the place of the model that training starts from, for task=align and
    # an online run, with rounds.reference=sft: folder or hub id, or the workdir of a run; of any
    # architecture, with the same tokenizer
    reference: str = place("", "model")
    random_init: bool = False  # take only the architecture from `path`; initialise the weights
    # Tokens that answers may contain, added to the tokenizer if it lacks them. Those that the chat
    # template writes, and csft's data.good_token and data.bad_token, are markers: added as special
    # tokens, and plain text where a turn spells them
    added_tokens: tuple[str, ...] = ()
    added_tokens_init: Literal["mean", "random"] = "mean"  # embedding and head rows of new tokens
    pad_vocab_to: PositiveInt = 1  # a vocabulary that grows is padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter on the frozen model of `model.path`."""

    rank: NonNegativeInt = 0  # rank of the adapter; 0: no adapter, all params are trained
    alpha: NonNegativeFloat = 0.0  # the adapter is scaled by alpha / rank; 0 means 4 x rank
    dropout: FractionBelowOne = 0.05  # dropout on the adapter's input, in training
    # Layers with an adapter: "all-linear", or Hugging Face module names (q_proj, ...)
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False  # scale the adapter by alpha / sqrt(rank) instead
    # How the frozen base is stored: in `compute_dtype`, or its linear layers in 8 or 4 bits
    base: Literal["compute", "int8", "nf4"] = "compute"
    # An adapter in PEFT format to start from; it has its own rank, alpha, targets and rslora
    path: str = place("", "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The records: where they are, which of them are used, and what is added to them."""

    # Training data: a file (JSON, JSON Lines, CSV, TSV, Parquet, Arrow; may be compressed), a
    # folder of files, a pattern ("DIR/*.jsonl"), one split of a folder ("DIR@split"), a data set
    # with a name in data/records/hub.py ("name@split"), any other one of the hub ("id@split" or
    # "id:config@split"), or several of these separated by commas
    train: str = place("", "source")
    # Held-out data, given like `train`; empty: those of `holdout`, or no evaluation
    eval: str = place("", "source")
    # In place of `eval`: prompts of `train` that are held out, with all of their records; the same
    # for every seed and order. 0: none
    holdout: NonNegativeInt = 0
    # Prompts that an online run's policy is scored on at the start and at the end alone; no
    # decision depends on them
    test: str = place("", "source")
    # Use only records of `train` whose field `split` has this value; empty: all
    train_split: str = ""
    eval_split: str = ""  # the same for `eval`
    test_split: str = ""  # the same for `test`

    # What is added to the records of `train`, `eval` and `test`, in this order:

    # "package.module:function" that maps a record to a record, or to None to leave it out
    map: str = ""
    # Names of fields: "prompt=problem,completion=solution" maps our names to the records' names
    fields: str = ""
    prompt_template: str = ""  # makes the user's turn from the record's fields: "Solve: {question}"
    system_prompt: str = ""  # system turn for conversations that have none
    # Join system turns to the next user turn, and adjacent turns of one role, for templates that
    # refuse system turns or insist that user and assistant alternate
    merge_turns: bool = False
    skip_bad: bool = False  # skip and count bad records instead of stopping at the first one
    ignore_fields: str = ""  # fields, and keys of turns, to leave unread on purpose: "id,meta"
    # Training records to use, a random subset that depends on the seed; 0: all
    max_train: NonNegativeInt = growing(0, "online", elsewhere="result", zero_is_all=True)
    max_eval: NonNegativeInt = 0  # records of `eval` to use, the same for every seed; 0: all
    max_test: NonNegativeInt = 0  # the same for `test`
    # Examples to train on, counted over all epochs; 0: as many as train.epochs makes
    n_examples: NonNegativeInt = growing(0, "sft", "reward_model", "align", zero_is_all=True)
    max_prompt_count: NonNegativeInt = 0  # most pairs to keep for each prompt; 0: all
    # Share of the distinct desirable answers to keep, for losses on single answers
    frac_unique_desirable: Fraction = 1.0
    # Share of the distinct undesirable answers to keep, for losses on single answers
    frac_unique_undesirable: Fraction = 1.0
    # Turn runs of spaces and tabs into one space, as HALOs does; this spoils code
    collapse_whitespace: bool = False
    learn_turns: Literal["all", "last"] = "all"  # assistant turns of a conversation that SFT learns
    # What SFT learns from feedback: each prompt's best output, or all preferred or desirable ones
    learn_outputs: Literal["best", "preferred"] = "best"
    good_token: str = "<|good|>"  # control token before desirable answers, for the loss "csft"
    bad_token: str = "<|bad|>"  # control token before all other answers, for the loss "csft"

    @property
    def held_out(self) -> str:
        """The source of the held-out records: `eval`, or `train` if a part of it is held out."""
        return self.eval or (self.train if self.holdout else "")

    @property
    def control(self) -> tuple[str, str]:
        """The control tokens of "csft": before desirable answers, and before all others."""
        return self.good_token, self.bad_token


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """The rounds of task=online: how many prompts they use, and what the loss compares with."""

    # Prompts that the whole run may use; one that several passes have counts once in each
    total_prompts: PositiveInt = growing(2048, "online")
    # Prompts of one round; "auto": as many as the signs of the rounds before suggest, within the
    # two bounds below
    prompts_per_round: PositiveInt | Literal["auto"] = 512
    min_prompts_per_round: PositiveInt = 128  # "auto": fewest prompts; sizes are multiples of it
    max_prompts_per_round: PositiveInt = 1024  # "auto": most prompts
    num_skip: NonNegativeInt = 0  # prompts to skip at the start of the run's order
    # Most passes over the prompts, each in a new order and with other samples
    passes: PositiveInt = growing(1, "online", elsewhere="result")
    # Reference of the loss: the SFT checkpoint, the policy as it was at the start of the round, or
    # as it was 1 to `sync_every` optimizer steps ago
    reference: Literal["sft", "round_start", "previous_step"] = "sft"
    # With reference="previous_step": optimizer steps between two updates of the reference
    sync_every: PositiveInt = 1
    export_each: bool = aside(False)  # export the policy of each round (rounds/0003/model)
    # Whether final/ holds the policy of the round with the highest held-out reward, whose
    # checkpoint is kept, and not the last policy; "auto": where there are held-out prompts
    keep_best: bool | Literal["auto"] = aside("auto")
    # Fresh samples of a round, whole prompts, for which the SFT checkpoint before its training and
    # the policy after it compute the log-probability: for signs of divergence and staleness. More
    # narrow their intervals, and cost two forward passes; 0: none; -1: all
    watch_samples: Annotated[int, Ge(-1)] = tuning(128)
    # Samples of a round, whole prompts, that the trainer's forward pass re-scores, to see that they
    # are the policy's; 0: none
    rescore_samples: NonNegativeInt = aside(8)
    # A run stops if the log-probabilities of sampler and trainer differ by more than this on
    # average (nats a token); "auto": 1e-4 in float32 on a CPU, 0.05 in bfloat16 or elsewhere
    rescore_mean: NonNegativeFloat | Literal["auto"] = aside("auto")
    # The same for the largest difference; "auto": 0.01 or 2
    rescore_max: NonNegativeFloat | Literal["auto"] = aside("auto")
    # Rounds from one evaluation on the held-out prompts to the next; round 0 and the last round of
    # the budget are evaluated in any case, but not a round after which the guard ends the run
    eval_every: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Bounds that a round of task=online must keep, and what is done if it does not."""

    # What is done: "warn": say so and go on; "stop": end the run there; "retry": go back to the
    # round with the highest held-out reward of those whose policy is within the bounds, with a
    # smaller learning rate and on further prompts
    action: Literal["warn", "stop", "retry"] = tuning("warn")
    # Highest KL divergence from the SFT policy, in nats a response, of the round's samples; 0: any
    max_kl: NonNegativeFloat = tuning(0.0)
    # Lowest margin of the implicit rewards of the round's pairs before training; "off": any
    min_margin: float | Literal["off"] = tuning("off")
    max_truncated: Fraction = tuning(1.0)  # highest share of samples that a limit has cut
    # Most that the mean length of the samples may differ from round 1, as a fraction of it; 0: any
    max_length_change: NonNegativeFloat = tuning(0.0)
    # One of eval.scorers, whose mean over the held-out samples must not fall, beyond its interval,
    # below its highest so far; empty: none
    scorer: str = tuning("")
    # Whether the held-out reward must not fall, beyond its interval, below its highest so far
    fall: bool = tuning(True)
    patience: PositiveInt = tuning(1)  # rounds in a row that must break a bound
    rate_factor: FractionAboveZero = tuning(0.5)  # "retry" multiplies the learning rate by it
    max_retries: NonNegativeInt = tuning(3)  # times that the run goes back before it stops instead


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled, and what task=sample writes."""

    num_samples_per_prompt: PositiveInt = 4  # samples to draw for each prompt
    temperature: NonNegativeFloat = 0.7  # the logits are divided by it; 0: greedy decoding
    # Sample from the likeliest tokens whose probabilities add up to this; 1: from all tokens
    top_p: FractionAboveZero = 0.95
    top_k: NonNegativeInt = 0  # sample from this many of the likeliest tokens; 0: no limit
    max_tokens: PositiveInt = 2048  # longest response, in tokens
    max_prompt_length: PositiveInt = 512  # longest prompt, in tokens; longer ones are cut
    # Text that begins every answer but is part of the prompt, such as csft's good token
    prefix: str = ""
    stop: tuple[str, ...] = ()  # stop strings, besides the end-of-sequence tokens
    slots: PositiveInt = execution(256)  # samples decoded at the same time, over all devices
    chunk: PositiveInt = execution(8)  # decode steps between two checks for finished samples
    # With no samples waiting, divide the slots by this once the busy ones still fit; 0: never
    shrink: int = execution(2)
    # Prompts in a shard, which is either on disk whole or sampled again
    shard_prompts: PositiveInt = execution(128)
    keep_logps: bool = False  # write the log-probability of each token into samples.jsonl
    # Write what tokens are drawn from: ratios are exact at any temperature, top_p and top_k.
    # "auto": where the loss has a ratio to the sampler that would else be wrong
    exact_ratios: bool | Literal["auto"] = "auto"
    max_kept: PositiveInt = 64  # with exact_ratios and top_p: most tokens to draw from
    generator: str = ""  # name of the policy in the records; empty: model.path

    # For task=sample alone:

    # Prompts to sample, in the run's order and after rounds.num_skip; 0: all
    num_prompts: NonNegativeInt = 0
    round: NonNegativeInt = 1  # draw the samples that this round of an online run would draw
    best_of: bool = False  # keep only the sample with the highest reward for each prompt
    # "samples": records of this package; "alpacaeval": the file that alpaca_eval reads
    format: Literal["samples", "alpacaeval"] = "samples"
    output: str = place("", "path")  # file to write; empty: one in the workdir


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    # The optimizer; "adafactor" keeps factored moments, "sgd" none
    name: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = "adamw"
    # Peak learning rate; 2e-6 suits preference losses on all weights, others: configs/README.md
    learning_rate: PositiveFloat = tuning(2e-6)
    beta1: FractionBelowOne = tuning(0.9)  # decay of the first moment
    beta2: FractionBelowOne = tuning(0.999)  # decay of the second moment
    eps: PositiveFloat = tuning(1e-8)  # added to the root of the second moment
    # Weight decay of matrices; HALOs, like torch by default, decays all params
    weight_decay: NonNegativeFloat = tuning(0.01)
    decay_biases: bool = tuning(True)  # apply weight decay to biases, too
    decay_norms: bool = tuning(False)  # apply weight decay to scales and biases of norms, too
    max_grad_norm: PositiveFloat = tuning(1.0)  # gradients are clipped to this norm
    # PPO: the gradient of the value head is clipped separately, to this norm
    value_max_grad_norm: PositiveFloat = tuning(0.1)
    # Learning rate after the warm-up; "wsd" (warmup-stable-decay) is constant, then decays
    schedule: Literal["constant", "linear", "cosine", "wsd"] = tuning("constant")
    decay_fraction: Fraction = tuning(0.2)  # share of all steps in which "wsd" decays
    warmup_fraction: Fraction = tuning(0.1)  # share of the expected steps spent on warm-up
    # Steps of warm-up; -1: warmup_fraction of the expected steps
    warmup_steps: Annotated[int, Ge(-1)] = tuning(-1)
    warmup_start: Fraction = tuning(0.1)  # first learning rate, as a fraction of the peak
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the moments


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batches, lengths and epochs of training."""

    # Examples (pairs, answers, groups, conversations) per optimizer step. They are spread evenly:
    # n examples make max(1, round(n / batch_size)) steps, whose sizes differ by one at most
    batch_size: PositiveInt = 32
    max_length: PositiveInt = 1250  # tokens of prompt + response; a longer response is cut
    # Passes over the examples; in an online run, over those of each round
    epochs: PositiveInt = growing(1, "online", "sft", "reward_model", "align")
    # Optimizer steps between evaluations; 0: only at the start and the end
    eval_every: NonNegativeInt = aside(32)
    # Optimizer steps between updates of the console's progress; metrics.jsonl has every step
    log_every: PositiveInt = aside(1)
    # Most tokens in a packed row; larger batches are split into microbatches
    tokens_per_device: PositiveInt = execution(16384)
    # Decay of a moving average of the policy, which is evaluated and exported; 0: no average
    ema_decay: FractionBelowOne = 0.0
    row_multiple: PositiveInt = execution(128)  # row lengths are rounded up to a multiple of this
    # For task=align: take the examples in the batches that this round of an online run would make;
    # 0: in an order of the seed alone
    round: NonNegativeInt = 0
    profile: NonNegativeInt = aside(0)  # optimizer steps to trace into workdir/profile; 0: none
    mask_truncated: bool = False  # compute no loss on responses that a token limit has cut


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has."""

    # Devices over which batches are split; -1 (for one axis at most): all that the others leave
    data: int = execution(-1)
    fsdp: int = execution(1)  # devices over which batches and params are split
    # Devices over which attention heads, MLP layers and the vocabulary are split
    tensor: int = execution(1)
    # Join the other processes of a job on several hosts (TPU VMs, SLURM, GKE)
    distributed: bool = execution(False)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and what is kept."""

    keep: PositiveInt = aside(1)  # number of round checkpoints to keep
    # Optimizer steps between checkpoints during training; 0: only at its end
    every: NonNegativeInt = aside(0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How held-out data are scored, and what task=eval measures on `data.eval`."""

    # "samples": draw samples for its prompts and score them; "feedback": compute the loss on it
    on: Literal["samples", "feedback"] = "samples"
    # Reference of the loss; empty: that of the run at model.path: its model.reference, or else the
    # model that it started from
    reference: str = place("", "model")
    # A second policy for task=eval, which answers the same prompts with the same random numbers, to
    # be compared with that of `model.path`: folder, hub id, workdir of a run, or folder of a round;
    # "sft": what the run at `model.path` started from, or of a branch what the first run did
    against: str = place("", "model")
    against_checkpoint: int | Literal["auto"] = "auto"  # as model.checkpoint, of `eval.against`
    # For task=compare: the samples that those of `data.eval` are compared with
    second_samples: str = place("", "source")
    # More rewards for samples of held-out and test prompts, for metrics alone: name -> fields
    scorers: Mapping[str, ScorerConfig] = dataclasses.field(default_factory=dict)
    # Temperature of the samples for `data.test`; 0: greedy decoding; "auto": sampling.temperature
    test_temperature: float | Literal["auto"] = "auto"
    # Samples for each prompt of `data.test`; 0: as sampling.num_samples_per_prompt, and 1 where
    # decoding is greedy
    test_samples: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The model that a run leaves for others, and where task=export writes the one it reads."""

    # For task=export alone: folder to write; empty: final/ in the workdir
    output: str = place("", "path")
    # dtype of the exported weights; "auto": that of the weights at model.path; "params":
    # model.params_dtype, so that nothing is rounded. Within a pipeline "auto" is "params" up to the
    # last task that trains or exports
    dtype: Literal["auto", "params", "float32", "bfloat16", "float16"] = result_in("auto", "export")
    license: str = aside("")  # licence that the model card names, such as "apache-2.0"
    # Repository OWNER/NAME of the Hugging Face Hub that the export is pushed to; empty: it is not
    push_to_hub: str = aside("")
    private: bool = aside(True)  # whether that repository is private


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The data of task=toy_data: prompts that ask to sort letters, no two alike."""

    num_sft: PositiveInt = 6000  # demonstrations for SFT
    num_pairs: NonNegativeInt = 6000  # pairs for a reward model
    num_prompts: NonNegativeInt = 2048  # prompts for an online run
    num_eval: PositiveInt = 128  # held-out prompts
    mistakes: Fraction = 0.5  # share of the demonstrations that are wrong on purpose
    alphabet: str = "abcdefghij"  # letters that prompts are made of, each once
    min_letters: PositiveInt = 4  # fewest letters in a prompt
    max_letters: int = 6  # most letters in a prompt


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """Services that follow the metrics of a run, besides metrics.jsonl."""

    # "tensorboard", "wandb", "trackio", or a class of your own as "package.module:Class"
    names: tuple[str, ...] = aside(())
    project: str = aside("halos_jax")  # project of wandb and trackio
    run: str = aside("")  # name of the run there; empty: that of the workdir
    offline: bool = aside(False)  # write files alone, without any network
    samples: NonNegativeInt = aside(32)  # rows of the table of held-out samples; 0: no table


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What task=bench times."""

    cases: tuple[str, ...] = ()  # names of cases in halos_jax/bench/workloads.py
    steps: PositiveInt = 10  # timed steps of a training or scoring case
    # Examples per step, or prompts to sample; 0: the case's own number
    examples: NonNegativeInt = 0
    tiny: bool = False  # shrink models and batches so that a CPU can run them


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Several tasks as one run; see `expand_pipeline`."""

    tasks: tuple[str, ...] = ()  # tasks to run one after the other, each in workdir/<task>
    # Fields for one of the tasks, task -> section -> field -> value; "{workdir}" in a string is
    # the pipeline's workdir
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
