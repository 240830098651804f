"""Feedback that teaches little is said."""

import logging

import pytest

from halos_jax.config import Config, FeedbackConfig
from halos_jax.rewards.feedback import make_groups, make_judgements, make_preferences
from halos_jax.rewards.feedback_report import report_feedback
from halos_jax.types import Prompt, Sample, Turn


def make_samples(rewards, prompt_id="p"):
    prompt = Prompt(prompt_id, (Turn("user", f"question {prompt_id}"),), {"answer": "4"})
    return [
        Sample(
            prompt=prompt,
            sample_id=index,
            output=f"answer {index}",
            prompt_ids=(1, 2, 3),
            response_ids=(10 + index, 7),
            finish_reason="stop",
            reward=reward,
        )
        for index, reward in enumerate(rewards)
    ]


def report(caplog, samples, **feedback) -> list[str]:
    """Return the warnings about the feedback of samples."""
    loss = {"name": feedback.pop("loss", "grpo")}
    config = Config(feedback=FeedbackConfig(**feedback), loss=loss)
    kind, threshold = config.feedback.type, config.feedback.threshold
    if kind == "pairwise":
        least = 0.0 if threshold == "auto" else threshold
        counts = make_preferences(samples, mode="max", threshold=least, seed=0, round=1).counts
    elif kind == "binary":
        _, counts = make_judgements(samples, threshold=threshold, scope=config.feedback.scope)
    else:
        _, counts = make_groups(samples)
    with caplog.at_level(logging.INFO, "halos_jax.rewards.feedback_report"):
        report_feedback("round 3", counts, samples, config)
    first, *rest = caplog.records
    assert first.levelname == "INFO"
    assert first.message.startswith(f"round 3: {kind} feedback: prompts {counts['prompts']}, ")
    assert all(one.levelname == "WARNING" for one in rest)
    return [one.message for one in rest]


def make_many(rewards):
    return [one for n, pair in enumerate(rewards) for one in make_samples(pair, f"p{n}")]


@pytest.mark.parametrize(
    ("rewards", "feedback", "expected"),
    [
        ([[1, 0]] * 4, {"type": "pairwise"}, None),
        ([[1, 1]] * 3 + [[None, 2]], {"type": "pairwise"},
         "round 3: no pair of 4 prompts: 1 have fewer than two rewards, and those of the others "
         "are equal, or no further apart than feedback.threshold=0; the rewards go from 1 to 2, "
         "their median is 1"),
        ([[1, 2]], {"type": "pairwise", "threshold": 1.5}, "than feedback.threshold=1.5; the "),
        ([[1, 0], [1, 1]], {"type": "scalar"}, None),
        ([[1, 1], [0, 0], [2, None]], {"type": "scalar"},
         "round 3: each of 3 groups has equal rewards: none says which of its answers is better; "
         "the rewards go from 0 to 2, their median is 1"),
        ([[1, 1], [0, 0]], {"type": "scalar", "loss": "ppo"}, None),
        ([[1, 0]] * 19 + [[0, 0]], {"type": "binary", "threshold": 1.0}, None),
        ([[0, 0]] * 18 + [[0, 1]] * 2, {"type": "binary", "threshold": 1.0}, None),  # 5 %
        ([[0, 0]] * 19 + [[0, 1]], {"type": "binary", "threshold": 1.0},
         "round 3: 1 of 40 answers (2.5%) are desirable, too few to learn from; set feedback."
         "threshold to the least reward that is desirable, or to 'median' or 'mean' with "
         "feedback.scope='file' or 'prompt'; the rewards go from 0 to 1, their median is 0"),
        ([[1, 2]] * 4, {"type": "binary", "threshold": 1.0},
         "round 3: 0 of 8 answers (0.0%) are undesirable, too few"),
        ([[1, 1]] * 4, {"type": "binary", "threshold": "median"},
         "round 3: no answer gets a label, since all rewards are equal; set feedback.threshold to"),
        ([[None, None]], {"type": "binary", "threshold": "median"}, None),
    ],
)  # fmt: skip
def test_feedback_that_teaches_little_is_said(caplog, rewards, feedback, expected):
    warnings = report(caplog, make_many(rewards), **feedback)
    if expected is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and expected in warnings[0]
