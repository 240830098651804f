"""The config's section of rewards: a model, a function, a judge, or a weighted sum of these."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from halos_jax.config.kinds import RewardKind
from halos_jax.config.roles import aside, members, place


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    # Of an API with OpenAI's /chat/completions
    url: str = aside("https://api.openai.com/v1")
    model: str = ""  # as the API names it
    # Environment variable with the key; empty: none is sent
    key_variable: str = aside("OPENAI_API_KEY")
    mode: Literal["score", "compare"] = "score"  # each sample alone, or two samples of a prompt
    pairs: Literal["all", "neighbours"] = "all"  # of a prompt's samples, in mode "compare"
    # Jinja files of the system and the user message; empty: those of judge_prompts.py
    rubric: str = place("", "path")
    prompt: str = place("", "path")
    lowest: float = 0.0  # scores outside of [lowest, highest] are no answer
    highest: float = 10.0
    max_tokens: int = 1024  # of an answer; 0: not sent
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of the request
    concurrency: int = aside(16)  # requests under way at one time
    requests_per_minute: int = aside(0)  # 0: no limit
    timeout: float = aside(120.0)  # seconds without a byte after which a request has failed
    retries: int = aside(6)  # of a request that failed for a time: no connection, 429, 5xx
    repeats: int = aside(2)  # of a question whose answer has no score
    cache: str = aside("", "path")  # file of all answers; empty: judge.jsonl in the workdir


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One of several rewards; a field that is not set is that of `reward`."""

    weight: float = 1.0
    # Before it is weighted: mean 0 and deviation 1 over the file, or over each prompt's samples.
    normalise: Literal["none", "file", "prompt"] = "none"
    kind: RewardKind = "model"
    path: str = place("", "model")
    read_at: Literal["auto", "template_end", "end_of_turn"] = "auto"
    chat_template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    function: str = ""
    completions: Literal["auto", "text", "turns"] = "auto"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judge: JudgeConfig = JudgeConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_length: int = 2048


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    kind: RewardKind = "model"
    path: str = place("", "model")  # sequence classifier in Hugging Face format
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
    # A weighted sum of several rewards instead of one: name -> fields of a PartConfig.
    parts: Mapping[str, Any] = members(PartConfig)
    rules: tuple[str, ...] = ()  # further functions that score the held-out samples, for metrics
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_length: int = 2048
    # Stop where a larger fraction of the samples has no reward
    max_unlabelled: float = aside(0.1)
    missing_eos_penalty: float = 0.0  # taken off the reward of a sample cut by the token limit
    cut_at_sentence: bool = False  # score the output up to its last ".", "!" or "?", as HALOs does
