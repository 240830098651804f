"""The sections `reward` (a model, a function, a judge or a sum of these) and `feedback`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge

from halos_jax.config.bounds import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from halos_jax.config.kinds import FeedbackType, RewardKind
from halos_jax.config.roles import aside, place


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A language model behind an API that scores samples, or compares them."""

    # Base address of an API with OpenAI's /chat/completions
    url: str = aside("https://api.openai.com/v1")
    model: str = ""  # the judge's name at the API
    # Environment variable that holds the API key; empty: send no key
    key_variable: str = aside("OPENAI_API_KEY")
    # "score": rate each sample by itself; "compare": pick the better of two samples of a prompt
    mode: Literal["score", "compare"] = "score"
    # Which of a prompt's samples mode "compare" compares: every pair, or each with the next
    pairs: Literal["all", "neighbours"] = "all"
    # Jinja file of the system message; empty: the one in rewards/judge/prompts.py
    rubric: str = place("", "path")
    # Jinja file of the user message; empty: the one in rewards/judge/prompts.py
    prompt: str = place("", "path")
    lowest: float = 0.0  # lowest valid score; an answer with a lower one has no score
    highest: float = 10.0  # highest valid score; an answer with a higher one has no score
    max_tokens: NonNegativeInt = 1024  # longest answer, in tokens; 0: send no limit
    # Further fields of each request
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: PositiveInt = aside(16)  # most requests in flight at the same time
    requests_per_minute: NonNegativeInt = aside(0)  # most requests per minute; 0: no limit
    timeout: PositiveFloat = aside(120.0)  # seconds of silence after which a request has failed
    # Times to retry a request after a temporary failure: no connection, 429, 5xx
    retries: NonNegativeInt = aside(6)
    repeats: NonNegativeInt = aside(2)  # times to ask again when an answer has no score
    cache: str = aside("", "path")  # file of all answers; empty: judge.jsonl in the workdir


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One of several rewards; fields that it does not set are taken from `reward`."""

    weight: float = 1.0  # factor of its score in the sum
    # Scale its scores to mean 0 and deviation 1 first, over the file or over each prompt's samples
    normalise: Literal["none", "file", "prompt"] = "none"
    kind: RewardKind = "model"  # as reward.kind
    path: str = place("", "model")  # as reward.path
    read_at: Literal["auto", "template_end", "end_of_turn"] = "auto"  # as reward.read_at
    # As reward.chat_template_options
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    function: str = ""  # as reward.function
    completions: Literal["auto", "text", "turns"] = "auto"  # as reward.completions
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as reward.arguments
    judge: JudgeConfig = JudgeConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # as reward.compute_dtype
    max_length: PositiveInt = 2048  # as reward.max_length


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """A reward that is measured on held-out samples, and not trained on."""

    kind: RewardKind = "model"  # as reward.kind
    path: str = place("", "model")  # as reward.path
    read_at: Literal["auto", "template_end", "end_of_turn"] = "auto"  # as reward.read_at
    # As reward.chat_template_options
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    function: str = ""  # as reward.function
    completions: Literal["auto", "text", "turns"] = "auto"  # as reward.completions
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as reward.arguments
    judge: JudgeConfig = JudgeConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # as reward.compute_dtype
    max_length: PositiveInt = 2048  # as reward.max_length


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How samples are scored."""

    # What scores the samples: a reward model, a function of yours, or a judge; "none": nothing, for
    # a loss that needs no rewards (gkd)
    kind: RewardKind = "model"
    # Reward model: folder or hub id of a sequence classifier in Hugging Face format
    path: str = place("", "model")
    # Token at which a reward model's score is read. "template_end": the last one that its chat
    # template writes, as in transformers; "end_of_turn": the answer's end marker, or its last token
    # if it was cut; "auto": as trained by task=reward_model, "template_end" for any other model
    read_at: Literal["auto", "template_end", "end_of_turn"] = "auto"
    # Variables for the reward model's chat template besides the conversation; the policy's
    # (model.chat_template_options) do not apply to it
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # "package.module:function", called with the prompt's turns and the response for each sample; a
    # function with a parameter `completions` is called once a batch, as TRL calls it
    function: str = ""
    # What a function's `completions` are: texts or lists of turns; "auto": as annotated, else texts
    completions: Literal["auto", "text", "turns"] = "auto"
    # Further arguments of the function, name -> value
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: JudgeConfig = JudgeConfig()
    # Several rewards, added with weights: name -> fields of the part. Fields that a part does not
    # set are taken from `reward`.
    parts: Mapping[str, PartConfig] = dataclasses.field(default_factory=dict)
    rules: tuple[str, ...] = ()  # more functions that score held-out samples, for metrics alone
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # dtype a reward model computes in
    # Tokens of prompt + response that a reward model reads; the rest of a longer one is not scored
    max_length: PositiveInt = 2048
    # Stop the run if a larger fraction of the samples gets no reward
    max_unlabelled: Fraction = aside(0.1)
    # Subtracted from the reward of a sample that the token limit has cut
    missing_eos_penalty: NonNegativeFloat = 0.0
    cut_at_sentence: bool = False  # score the text up to its last ".", "!" or "?", as HALOs does


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """The feedback that the rewards of a round's samples are turned into."""

    # "pairwise": pairs of a better and a worse sample; "binary": samples that are desirable or
    # not; "scalar": all samples of a prompt with their rewards; "samples": all samples as they are,
    # for a loss that needs no rewards (gkd)
    type: FeedbackType = "pairwise"
    # Pairs that "pairwise" makes of a prompt's samples. "random": neighbours in a random order;
    # "max": the best and the worst; "min": those with the closest rewards; "all": every pair
    mode: Literal["random", "max", "min", "all"] = "max"
    # For "pairwise", the difference of rewards that a pair must exceed (in mode "min": reach). For
    # "binary", the lowest desirable reward: a number, or the mean or median of the rewards; rewards
    # equal to that average all join the class that makes the two more even. "auto" is 0 for
    # "pairwise" and "median" for "binary".
    threshold: float | Literal["auto", "mean", "median"] = "auto"
    # Whether "binary" takes the mean or median over all rewards or over those of one prompt
    scope: Literal["file", "prompt"] = "file"
    # Most that the lengths of a pair's answers, in tokens, may differ, as a fraction of the longer
    # one; "max" then takes the best pair within it; 0: any
    max_length_gap: Fraction = 0.0
    # Weigh the pairs of a round in the loss by the difference of their rewards, at most this many
    # times the mean difference; the weights have mean 1; 0: all pairs weigh the same
    margin_weights: NonNegativeFloat = 0.0
    # Least examples of an online round: while it has fewer, because its samples tie, further
    # prompts are sampled for it, a shard at a time, from the run's budget; 0: no further prompts
    min_examples: NonNegativeInt = 0
    # Most prompts of such a round, as a multiple of those that it begins with
    max_prompts_factor: Annotated[float, Ge(1)] = 2.0
    # Share of the examples that a round trains on that are those of earlier rounds, chosen at
    # random, with the log-probabilities of the policies that sampled them; 0: none
    replay: FractionBelowOne = 0.0
