"""The config's section of rewards: a model, a function, a judge, or a weighted sum of these."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from halos_jax.config import schema
from halos_jax.config.bounds import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from halos_jax.config.kinds import RewardKind
from halos_jax.config.roles import aside, place


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A language model behind an API that scores samples, or compares them."""

    # Of an API with OpenAI's /chat/completions
    url: str = aside("https://api.openai.com/v1")
    model: str = ""  # as the API names it
    # Environment variable with the key; empty: none is sent
    key_variable: str = aside("OPENAI_API_KEY")
    mode: Literal["score", "compare"] = "score"  # each sample alone, or two samples of a prompt
    pairs: Literal["all", "neighbours"] = "all"  # of a prompt's samples, in mode "compare"
    # Jinja file of the system message; empty: that of rewards/judge/prompts.py
    rubric: str = place("", "path")
    # Jinja file of the user message; empty: that of rewards/judge/prompts.py
    prompt: str = place("", "path")
    lowest: float = 0.0  # scores outside of [lowest, highest] are no answer
    highest: float = 10.0  # the highest score
    max_tokens: NonNegativeInt = 1024  # of an answer; 0: not sent
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of the request
    concurrency: PositiveInt = aside(16)  # requests under way at one time
    requests_per_minute: NonNegativeInt = aside(0)  # 0: no limit
    timeout: PositiveFloat = aside(120.0)  # seconds without a byte after which a request has failed
    # Of a request that failed for a time: no connection, 429, 5xx
    retries: NonNegativeInt = aside(6)
    repeats: NonNegativeInt = aside(2)  # of a question whose answer has no score
    cache: str = aside("", "path")  # file of all answers; empty: judge.jsonl in the workdir


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One of several rewards; a field that is not set is that of `reward`."""

    weight: float = 1.0  # what its score is multiplied by in the sum
    # Before it is weighted: mean 0 and deviation 1 over the file, or over each prompt's samples.
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
class RewardConfig:
    """What scores samples."""

    kind: RewardKind = "model"  # what gives the scores
    path: str = place("", "model")  # sequence classifier in Hugging Face format: a folder or hub id
    # The token at which a model's score is read: the last that its template writes, as transformers
    # does; the answer's end marker, or last token if it was cut; "auto": where task=reward_model
    # has trained it, and of any other model the template's end
    read_at: Literal["auto", "template_end", "end_of_turn"] = "auto"
    # What the model's chat template is given besides the conversation, as for the policy's
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # "package.module:function", called with (prompt turns, response text), or where it has a
    # parameter `completions` once a batch, as TRL calls it
    function: str = ""
    # Of such a batch: texts, or lists of turns; "auto": what its annotation says, else texts
    completions: Literal["auto", "text", "turns"] = "auto"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the function
    judge: JudgeConfig = JudgeConfig()
    # A weighted sum of several rewards instead of one: name -> fields of a PartConfig. Those that
    # a part does not set are those of the reward.
    parts: Mapping[str, PartConfig] = dataclasses.field(default_factory=dict)
    rules: tuple[str, ...] = ()  # further functions that score the held-out samples, for metrics
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of a model
    max_length: PositiveInt = 2048  # tokens of prompt and response that a model scores
    # Stop where a larger fraction of the samples has no reward
    max_unlabelled: Fraction = aside(0.1)
    # Taken off the reward of a sample cut by the token limit
    missing_eos_penalty: NonNegativeFloat = 0.0
    cut_at_sentence: bool = False  # score the output up to its last ".", "!" or "?", as HALOs does


def with_parts(reward: RewardConfig, parts: Mapping[str, Mapping[str, Any]]) -> RewardConfig:
    """Return a reward with these parts, name -> the fields of a PartConfig that it sets itself.

    Raises:
      ValueError: with a line for each unknown field and bad value.
    """
    errors: list[str] = []
    made = schema.build_members(reward, "parts", parts, "reward.parts", errors)
    if errors:
        raise ValueError("\n".join(errors))
    return dataclasses.replace(reward, parts=made)
