"""What the benchmark runs: the cases, the architectures and the lengths of their examples."""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from halos_jax.config import ModelConfig, SamplingConfig
from halos_jax.drawn import Drawn
from halos_jax.models.hf.families import make_decoder_config
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item

Kind = Literal["train", "reference", "reward", "sample", "round", "agreement"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure; see `CASES`.

    `examples` are the items of an optimizer step or of a forward pass; of "sample" and "round"
    they are prompts, each sampled `samples` times. `lengths` is "real" (drawn from the pairs of
    AlpacaEval), or (prompt, response) tokens of every example; of "sample" the response is the
    token limit, and `mean` the mean of the geometric distribution that ends a response before it.
    """

    kind: Kind
    model: str
    examples: int
    lengths: tuple[int, int] | Literal["real"] = "real"
    loss: str = "dpo"
    samples: int = 1
    mean: int = 0

    @property
    def fixed_lengths(self) -> tuple[int, int]:
        """(prompt, response) tokens, of a case whose examples are all of one length."""
        if self.lengths == "real":
            raise ValueError(f"a case of kind {self.kind!r}: lengths: got 'real', allowed: two")
        return self.lengths


CASES: dict[str, Case] = {
    "dpo_1b_full": Case("train", "1b", 16, (512, 512)),
    "dpo_1b_real": Case("train", "1b", 64),
    "dpo_8b_full": Case("train", "8b", 8, (512, 512)),
    "dpo_8b_real": Case("train", "8b", 32),
    "kto_1b_real": Case("train", "1b", 64, loss="kto"),
    "dapo_1b_full": Case("train", "1b", 16, (512, 512), loss="dapo"),
    "reference_1b": Case("reference", "1b", 64),
    "reward_1b": Case("reward", "1b", 64),
    "decode_1b": Case("sample", "1b", 256, (128, 256)),
    "decode_8b": Case("sample", "8b", 256, (128, 256)),
    "sample_1b_varied": Case("sample", "1b", 512, (128, 1024), samples=4, mean=200),
    "round_1b": Case("round", "1b", 512, (128, 256), samples=4),
    "agreement_1b": Case("agreement", "1b", 16),
}

# Hugging Face configs: Llama 3.2 1B and Llama 3.1 8B (Grattafiori et al. 2024), and a toy.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3 = _LLAMA | {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": _LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}
_SHRINK = 32  # how many times shorter, and fewer, everything is in the tiny variant


def get_case(name: str, *, tiny: bool) -> Case:
    """Return the case, or its tiny variant: everything in it, at a size for a CPU."""
    case = CASES[name]
    if not tiny:
        return case
    lengths = case.lengths
    if lengths != "real":
        prompt, response = lengths
        lengths = max(prompt // _SHRINK, 4), max(response // _SHRINK, 4)
    return dataclasses.replace(
        case,
        model="tiny",
        examples=max(case.examples // _SHRINK, 8),
        lengths=lengths,
        mean=case.mean // _SHRINK,
    )


def make_decoder(case: Case, settings: ModelConfig) -> DecoderConfig:
    """Return the decoder of a case, run as `settings` says; of "reward" with one label."""
    decoder = make_decoder_config(ARCHITECTURES[case.model], settings)
    return dataclasses.replace(decoder, num_labels=1) if case.kind == "reward" else decoder


@functools.cache
def load_lengths() -> tuple[tuple[int, int, int], ...]:
    """Return (prompt, chosen, rejected) tokens of 1,024 AlpacaEval pairs."""
    file = importlib.resources.files("halos_jax.bench") / "alpacaeval_lengths.json"
    return tuple(map(tuple, json.loads(file.read_text("utf-8"))["lengths"]))


def make_items(
    case: Case, *, steps: int, vocab_size: int, sampling: SamplingConfig | None = None
) -> list[Item]:
    """Return the examples of `steps` steps, of random tokens; always the same.

    Args:
      sampling: how answers of a group were sampled: with `exact_ratios` they say so.
    """
    rng = np.random.default_rng(0)
    count, unpaired = case.examples * steps, case.loss == "kto"

    def draw(length: int) -> np.ndarray:
        return rng.integers(3, vocab_size, length, dtype=np.int32)

    if case.loss == "dapo":
        return [
            _make_group([draw(length) for length in lengths], vocab_size, sampling, rng)
            for lengths in _list_lengths(case, count)
        ]
    roles = (TARGET, MISMATCHED) if unpaired else (CHOSEN, REJECTED)
    items = []
    for number, (prompt, *responses) in enumerate(_list_lengths(case, count)):
        answers = tuple(draw(length) for length in responses)
        items.append(Item(draw(prompt), answers, roles, desirable=number % 2 == 0))
    return items


def _make_group(
    ids: Sequence[np.ndarray],
    vocab_size: int,
    sampling: SamplingConfig | None,
    rng: np.random.Generator,
) -> Item:
    """Return a prompt's ids with those of its answers as a group; their sets are full."""
    prompt, *answers = ids
    item = Item(
        prompt,
        tuple(answers),
        (MEMBER,) * len(answers),
        tuple(rng.normal(size=len(answers)).tolist()),
        old_logps=tuple(np.full(len(one), -np.log(vocab_size), np.float32) for one in answers),
    )
    if sampling is None or sampling.exact_ratios is not True:
        return item
    is_filtered = sampling.top_k > 0 or sampling.top_p < 1
    width = min(sampling.top_k or sampling.max_kept, vocab_size) if is_filtered else 0

    def describe(answer: np.ndarray) -> Drawn:
        drawn = Drawn(sampling.temperature, (-math.log(width or vocab_size),) * len(answer))
        if not width:
            return drawn
        # Neighbours of the token, as many before it as there is room for.
        first = np.minimum(answer, vocab_size - width)
        kept = (first[:, None] + np.arange(width)).astype("<i4")
        counts = (width,) * len(answer)
        return dataclasses.replace(drawn, kept_counts=counts, kept_ids=kept.tobytes())

    return dataclasses.replace(item, drawn=tuple(map(describe, answers)))


def _list_lengths(case: Case, count: int) -> Sequence[tuple[int, ...]]:
    if case.lengths != "real":
        prompt, response = case.lengths
        return [(prompt, response, response)] * count
    known, shrink = load_lengths(), _SHRINK if case.model == "tiny" else 1
    return [
        tuple(max(length // shrink, 1) for length in known[number % len(known)])
        for number in range(count)
    ]
