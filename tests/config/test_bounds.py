"""The bounds that stand in the types of the config's fields."""

import dataclasses
import math
import typing
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Interval

from halos_jax.config import Config, bounds, schema
from halos_jax.config.rewards import PartConfig

# Least value -> the integers and numbers that must not be below it.
AT_LEAST = {
    -1: ("optimizer.warmup_steps", "rounds.watch_samples", "verify.samples", "verify.steps"),
    0: (
        *("hang_minutes", "train.profile"),
        "rounds.rescore_samples",
        *("bench.examples", "checkpoint.every", "data.max_eval", "data.max_prompt_count"),
        *("data.holdout", "data.max_test", "eval.test_samples"),
        *("data.max_train", "data.n_examples", "guard.max_kl", "guard.max_length_change"),
        *(
            "feedback.margin_weights",
            "feedback.min_examples",
            "guard.max_retries",
            "lora.alpha",
            "lora.rank",
        ),
        *("optimizer.weight_decay", "reward.judge.max_tokens", "reward.judge.repeats"),
        *("reward.judge.requests_per_minute", "reward.judge.retries"),
        *("reward.missing_eos_penalty", "rounds.num_skip", "sampling.num_prompts"),
        *("sampling.round", "sampling.temperature", "sampling.top_k", "toy.num_pairs"),
        *("toy.num_prompts", "trackers.samples", "train.eval_every", "train.round"),
        "branch.round",
    ),
    1: (
        *("feedback.max_prompts_factor", "guard.patience"),
        *("bench.steps", "checkpoint.keep", "model.head_chunk", "model.pad_vocab_to"),
        *("reward.judge.concurrency", "reward.max_length"),
        *("rounds.max_prompts_per_round", "rounds.min_prompts_per_round"),
        *(
            "rounds.eval_every",
            "rounds.passes",
            "rounds.sync_every",
            "rounds.total_prompts",
            "sampling.chunk",
        ),
        *("sampling.max_kept", "sampling.max_prompt_length", "sampling.max_tokens"),
        *("sampling.num_samples_per_prompt", "sampling.shard_prompts", "sampling.slots"),
        *("toy.min_letters", "toy.num_eval", "toy.num_sft", "train.batch_size", "train.epochs"),
        *("train.max_length", "train.log_every", "train.row_multiple", "train.tokens_per_device"),
    ),
}
ABOVE_ZERO = (
    *("optimizer.learning_rate", "optimizer.eps", "optimizer.max_grad_norm"),
    *("optimizer.value_max_grad_norm", "reward.judge.timeout"),
)
FRACTIONS = (
    "feedback.max_length_gap",
    *("data.frac_unique_desirable", "data.frac_unique_undesirable", "optimizer.decay_fraction"),
    *("optimizer.warmup_fraction", "optimizer.warmup_start", "reward.max_unlabelled"),
    *("guard.max_truncated", "toy.mistakes"),
)
BELOW_ONE = (
    "feedback.replay",
    "lora.dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "train.ema_decay",
)
ABOVE_ZERO_TO_ONE = ("guard.rate_factor", "sampling.top_p")


def change(path, value):
    """Return the default config with one field changed, whatever its bounds."""

    def put(section, names):
        inner = put(getattr(section, names[0]), names[1:]) if names[1:] else value
        return dataclasses.replace(section, **{names[0]: inner})

    return put(Config(), path.split("."))


@pytest.mark.parametrize(
    ("path", "bad", "edge", "allowed"),
    [
        (path, least - 1, least, f"{least} or more")
        for least, paths in AT_LEAST.items()
        for path in paths
    ]
    + [(path, 0.0, 1e-12, "greater than 0") for path in ABOVE_ZERO]
    + [(path, 1.01, 1.0, "0 to 1") for path in FRACTIONS]
    + [(path, -0.01, 0.0, "0 to 1") for path in FRACTIONS]
    + [(path, 1.0, 0.999, "0 or more, less than 1") for path in BELOW_ONE]
    + [("rounds.prompts_per_round", 0, 1, "1 or more, or 'auto'")]
    + [("rounds.prompts_per_round", "many", "auto", "1 or more, or 'auto'")]
    + [("verify.round", -1, 0, "0 or more, or 'all'")]
    + [(f"rounds.rescore_{one}", -1, 0, "0 or more, or 'auto'") for one in ("max", "mean")]
    + [(path, 0.0, 1e-6, "above 0, 1 at most") for path in ABOVE_ZERO_TO_ONE]
    + [(path, 1.01, 1.0, "above 0, 1 at most") for path in ABOVE_ZERO_TO_ONE],
)
def test_each_number_has_its_bounds(path, bad, edge, allowed):
    lines = list(bounds.find_violations(change(path, bad)))
    assert lines == [f"{path}: got {bad!r}, allowed: {allowed}"]
    assert list(bounds.find_violations(change(path, edge))) == []


def test_the_defaults_are_within_their_bounds_and_every_bound_is_tested():
    assert list(bounds.find_violations(Config())) == []

    def list_bounded(cls, prefix=""):
        for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
            if dataclasses.is_dataclass(annotation):
                yield from list_bounded(annotation, f"{prefix}{name}.")
            elif bounds.list_bounds(annotation):
                yield f"{prefix}{name}"

    tested = [path for paths in AT_LEAST.values() for path in paths]
    tested += [*ABOVE_ZERO, *FRACTIONS, *BELOW_ONE, *ABOVE_ZERO_TO_ONE]
    tested += ["rounds.prompts_per_round", "verify.round"]
    tested += ["rounds.rescore_max", "rounds.rescore_mean"]
    assert sorted(list_bounded(Config)) == sorted(tested)
    assert set(tested) <= schema.leaf_types(Config).keys()


def test_the_members_of_a_mapping_are_looked_at():
    @dataclasses.dataclass(frozen=True)
    class Parts:
        parts: typing.Mapping[str, PartConfig]

    parts = Parts({"a": PartConfig(max_length=0), "b": PartConfig()})
    assert list(bounds.find_violations(parts, "reward.")) == [
        "reward.parts.a.max_length: got 0, allowed: 1 or more"
    ]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[int, Ge(-1)], "-1 or more"),
        (Annotated[float, Gt(0)], "greater than 0"),
        (Annotated[float, Interval(ge=0, le=1)], "0 to 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "0 or more, less than 1"),
        (bounds.FractionAboveZero, "above 0, 1 at most"),
        (bounds.PositiveInt | Literal["auto"], "1 or more"),
        (int, ""),
    ],
)
def test_bounds_in_words(annotation, words):
    assert bounds.describe(bounds.list_bounds(annotation)) == words


@pytest.mark.parametrize(
    ("value", "default", "limits", "allowed"),
    [
        (1.0, False, (0.0, 1.0), "True or False"),
        (True, 1.0, (-math.inf, math.inf), "a finite number"),
        (math.inf, 1.0, (-math.inf, math.inf), "a finite number"),
        (0.5, 2.0, (1.0, math.inf), "1 or more"),
        (0.5, 0.1, (0.0, 0.5), "0 or more, less than 0.5"),
        (1.5, 0.1, (0.0, math.nextafter(1.0, 2.0)), "0 or more, 1 at most"),
    ],
)
def test_settings_that_have_a_default_alone(value, default, limits, allowed):
    assert not bounds.fits(value, default, limits)
    assert bounds.fits(default, default, limits)
    assert bounds.describe_setting(default, limits) == allowed
