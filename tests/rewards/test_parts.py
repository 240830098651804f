"""Sums of rewards against NumPy."""

import dataclasses

import numpy as np
import pytest

from halos_jax.config import Config, ConfigError, freeze, schema, to_dict
from halos_jax.config.rewards import JudgeConfig, PartConfig, RewardConfig, ScorerConfig
from halos_jax.rewards.labels import Labels, RewardError
from halos_jax.rewards.parts import make_sum_scorer, normalise_scores, part_to_reward
from halos_jax.types import FINISH_STOP, Prompt, Sample, Turn
from tests.reward_parts import with_parts

PROMPTS = [f"p{index // 3}" for index in range(12)]
SAMPLES = [
    Sample(Prompt(name, (Turn("user", name),)), index, "x" * index, (1,), (2,), FINISH_STOP)
    for index, name in enumerate(PROMPTS)
]


def draw_scores(seed, missing=()):
    scores = np.random.default_rng(seed).normal(3.0, 5.0, len(SAMPLES)).tolist()
    return [None if index in missing else score for index, score in enumerate(scores)]


def standardise(values):
    return (values - np.mean(values)) / np.std(values)


def test_the_sum_is_that_of_numpy_and_every_part_is_kept():
    first, second, third = draw_scores(0), draw_scores(1), draw_scores(2)
    parts = {
        "a": (PartConfig(weight=2.0), lambda samples: first),
        "b": (PartConfig(weight=-0.5, normalise="file"), lambda samples: second),
        "c": (PartConfig(weight=3.0, normalise="prompt"), lambda samples: Labels(third)),
    }
    labels = make_sum_scorer(parts)(SAMPLES)
    by_prompt = np.concatenate([standardise(np.array(third[i : i + 3])) for i in range(0, 12, 3)])
    expected = 2 * np.array(first) - 0.5 * standardise(np.array(second)) + 3 * by_prompt
    np.testing.assert_allclose(labels.rewards, expected, rtol=1e-12)
    assert labels.parts == {"a": first, "b": second, "c": third}


def test_a_sample_that_one_part_cannot_score_has_no_reward():
    first, second = draw_scores(0, missing=(4,)), draw_scores(1, missing=(7, 8))
    parts = {
        "a": (PartConfig(normalise="file"), lambda samples: first),
        "b": (PartConfig(), lambda samples: Labels(second, counts={"ties": 5})),
    }
    labels = make_sum_scorer(parts)(SAMPLES)
    assert [i for i, reward in enumerate(labels.rewards) if reward is None] == [4, 7, 8]
    # What is left out of one part still counts for the mean of the other.
    known = [i for i in range(12) if i != 4]
    normal = dict(zip(known, standardise(np.array([first[i] for i in known])), strict=True))
    assert labels.rewards[0] == pytest.approx(normal[0] + second[0], rel=1e-12)
    assert labels.counts == {"a_unlabelled": 1, "b_unlabelled": 2, "b_ties": 5}


def test_equal_scores_become_zero():
    # Their standard deviation, computed, is 2.8e-17.
    assert normalise_scores([0.1] * 3, ["p"] * 3, by="file") == [0.0] * 3
    assert normalise_scores([0.1, None, 5.0], ["p", "p", "q"], by="prompt") == [0.0, None, 0.0]
    assert normalise_scores([0.1, None], ["p", "q"], by="none") == [0.1, None]
    assert normalise_scores([], [], by="file") == []


def test_an_error_of_a_part_names_the_part():
    def fail(samples):
        raise RewardError("reward.function 'm:f': no answer; set reward.arguments.field")

    scorer = make_sum_scorer({"right": (PartConfig(), fail)})
    with pytest.raises(
        RewardError, match=r"^reward\.parts\.right\.function .* reward\.parts\.right\.arg"
    ):
        scorer([])


def test_a_part_has_the_rewards_fields_but_for_its_own():
    reward = RewardConfig(
        kind="function",
        function="m:f",
        max_length=99,
        missing_eos_penalty=2.0,
        judge=JudgeConfig(model="big", timeout=3.0),
    )
    given = {
        "one": {"weight": 2, "arguments": {"x": 1}},
        "two": {"kind": "judge", "judge": {"rubric": "r.jinja"}, "normalise": "file"},
    }
    reward = with_parts(reward, given)
    # What a part has of the reward is not written down twice.
    assert to_dict(Config(reward=reward))["reward"]["parts"] == given
    parts = reward.parts
    assert list(parts) == ["one", "two"] and parts["one"].weight == 2.0
    assert parts["one"].function == "m:f" and parts["one"].arguments == {"x": 1}
    alone = part_to_reward(parts["two"], reward)
    assert alone.kind == "judge" and alone.max_length == 99 and alone.missing_eos_penalty == 2.0
    assert alone.judge == dataclasses.replace(reward.judge, rubric="r.jinja")
    assert not alone.parts


def test_bad_parts_are_all_named():
    parts = {
        "a": 3,
        "b": {"wait": 2},
        "c": {"normalise": "z"},
        "d": {"weight": 0, "path": "x"},
        "e": {},
        "f": {"kind": "judge", "judge": {"model": "m", "url": "ftp://x", "timout": 1}},
        "g": {"kind": "judge", "judge": {"model": "m", "url": "https://u:hidden@x/v1"}},
        "h": {"kind": "function"},
        "rule": {"path": "x"},
    }
    # The default length, 2048, is less than what a prompt and a response may have together.
    plain = {"parts": parts, "rules": ("m:rule",), "max_length": 4096}
    with pytest.raises(ConfigError) as caught:
        freeze({"workdir": "w", "reward": plain})
    lines = [line[4:] for line in str(caught.value).splitlines() if line[4:].startswith("reward")]
    starts = [
        "reward.parts.a: got 3, allowed: a section",
        "reward.parts.b.wait: unknown field",
        "reward.parts.c.normalise: got 'z', allowed: 'none', 'file', 'prompt'",
        "reward.parts.f.judge.timout: unknown field; did you mean 'judge.timeout'",
        "reward.parts.d.weight: got 0",
        "reward.parts.e.path: got '', but reward.parts.e.kind='model' needs it",
        "reward.parts.g.judge.url: got what is no plain address",
        "reward.parts.h.function: got '', but reward.parts.h.kind='function' needs it",
        "reward.parts.rule: a metric has this name already",
    ]
    assert len(lines) == len(starts) and "hidden" not in "".join(lines)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start), line
    with pytest.raises(ValueError, match=r"reward\.parts\.b\.wait: unknown field"):
        with_parts(RewardConfig(), {"b": {"wait": 2}})


def test_a_part_and_a_scorer_have_one_set_of_a_reward_s_fields_and_defaults():
    part, scorer = schema.to_plain(PartConfig()), schema.to_plain(ScorerConfig())
    assert part.keys() - scorer.keys() == {"weight", "normalise"}
    assert {name: part[name] for name in scorer} == scorer
    whole = schema.to_plain(RewardConfig())
    assert {name: whole[name] for name in scorer} == scorer
    hints = [schema.list_hints(one) for one in (RewardConfig, PartConfig, ScorerConfig)]
    assert all(hints[0][name] == hints[1][name] == hints[2][name] for name in scorer)
