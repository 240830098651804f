"""Feedback of samples as they are, and what a run without a reward may ask for."""

import dataclasses

import pytest

from halos_jax.config import Config, ConfigError, default, freeze
from halos_jax.data.records.formats import sample_from_record
from halos_jax.rewards.samples import make_samples, warn_of_samples
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn


def make_sample(number, sample_id, reward=None, finish_reason=FINISH_STOP):
    prompt = Prompt(str(number), (Turn("user", f"question {number}"),))
    return Sample(prompt, sample_id, "yes", (5, 6), (7, 2), finish_reason, "me", reward)


def test_every_sample_is_an_example_whatever_its_reward():
    samples = [
        make_sample(1, 0),
        make_sample(1, 1),  # the same answer again counts again
        make_sample(2, 0, 3.5, FINISH_LENGTH),
    ]
    rows, counts = make_samples(Config(), samples, 1)
    assert [dataclasses.replace(sample_from_record(row)) for row in rows] == samples
    assert counts == {"prompts": 2, "examples": 3, "truncated": 1}
    assert warn_of_samples(Config(), counts) == ""


def refused(**changes):
    config = default()
    config.model.path, config.data.train, config.workdir = "m", "d", "w"
    config.model.teacher, config.loss.name = "t", "gkd"
    config.feedback.type, config.reward.kind = "samples", "none"
    config.train.max_length = 4096
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        setattr(config[section] if section else config, name, value)
    try:
        freeze(config)
    except ConfigError as error:
        return [line.strip(" -") for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        (
            {"feedback__type": "binary"},
            "reward.kind: got 'none', but feedback.type='binary' is made of rewards; allowed: "
            "'model', 'function', 'judge'; or feedback.type='samples' with a loss that needs none",
        ),
        ({"task": "label"}, "reward.kind: got 'none', but task='label' is to score samples"),
        (
            {"reward__missing_eos_penalty": 1.0},
            "reward.missing_eos_penalty: got 1.0, allowed with reward.kind='none': 0.0",
        ),
        (
            {"reward__cut_at_sentence": True},
            "reward.cut_at_sentence: got True, allowed with reward.kind='none': False",
        ),
    ],
)
def test_what_needs_rewards_is_refused_without_them(changes, expected):
    found = refused(**changes)
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)


def test_a_scorer_or_a_part_without_scores_is_refused():
    for path in ("eval.scorers", "reward.parts"):
        config = default()
        config.model.path, config.data.train, config.workdir = "m", "d", "w"
        config.data.eval, config.reward.path = "e", "r"
        section = config.eval.scorers if path == "eval.scorers" else config.reward.parts
        section.nothing = {"kind": "none"}
        with pytest.raises(ConfigError, match=f"{path}.nothing.kind: got 'none', which gives no"):
            freeze(config)
