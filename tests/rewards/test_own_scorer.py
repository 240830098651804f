"""A scorer from Python: its numbers are taken, and what is no reward is refused by name."""

import numpy as np
import pytest

from halos_jax.rewards.labels import Labels, RewardError
from halos_jax.rewards.own_scorer import guard_scorer
from halos_jax.types import FINISH_STOP, Prompt, Sample, Turn

PROMPT = Prompt("p1", (Turn("user", "question"),))
SAMPLES = [Sample(PROMPT, i, f"answer {i}", (1,), (2,), FINISH_STOP) for i in range(3)]


@pytest.mark.parametrize(
    "given",
    [[1, None, 0.5], (True, None, np.float32(0.5)), np.asarray([1.0, 0.0, 0.5])],
    ids=["list", "tuple", "array"],
)
def test_numbers_are_taken_as_floats(given):
    found = guard_scorer(lambda samples: given)(SAMPLES)
    assert found == [1.0, 0.0 if isinstance(given, np.ndarray) else None, 0.5]
    assert all(one is None or type(one) is float for one in found)


def test_labels_keep_what_they_say_beside_the_rewards():
    labels = Labels([1, 2, 3], counts={"ties": 1})
    found = guard_scorer(lambda samples: labels)(SAMPLES)
    assert (found.rewards, found.counts) == ([1.0, 2.0, 3.0], {"ties": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "got 3 samples and gave 1 values; allowed: a list of as many numbers"),
        (0.5, "got 3 samples and gave 0.5; allowed"),
        (None, "got 3 samples and gave None; allowed"),
        ([1.0, "good", 2.0], "gave 'good' for prompt p1, sample 1; allowed: a finite number"),
        ([1.0, 2.0, float("nan")], "gave nan for prompt p1, sample 2; allowed"),
    ],
    ids=["too few", "a number", "nothing", "text", "nan"],
)
def test_what_is_no_reward_is_refused(given, message):
    with pytest.raises(RewardError, match=message):
        guard_scorer(lambda samples: given)(SAMPLES)
