"""Labels: nothing invented for a sample without a reward, nothing lost on the way to the file."""

import json

import pytest

from halos_jax.config import RewardConfig
from halos_jax.data.records.fields import RecordError
from halos_jax.rewards.labels import (
    Labels,
    RewardError,
    average_rewards,
    join_labels,
    label_samples,
    make_score_rows,
    measure_labels,
    read_labels,
    read_scores,
)
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn


def make_samples(*finishes):
    prompt = Prompt("p", (Turn("user", "question"),))
    return [Sample(prompt, i, f"answer {i}", (1,), (2,), f) for i, f in enumerate(finishes)]


SAMPLES = make_samples(FINISH_STOP, FINISH_LENGTH, FINISH_LENGTH, FINISH_STOP)


def test_the_penalty_meets_what_has_no_end_and_the_raw_score_is_kept(tmp_path):
    settings = RewardConfig(missing_eos_penalty=0.5, max_unlabelled=0.25)
    labels = label_samples(lambda samples: [1.0, 2.0, None, -1.0], SAMPLES, settings)
    assert labels.rewards == [1.0, 1.5, None, -1.0] and labels.raw == [1.0, 2.0, None, -1.0]
    rows = make_score_rows(SAMPLES, labels)
    assert [row["raw_reward"] for row in rows] == [1.0, 2.0, None, -1.0]
    assert measure_labels(labels, "train") == {
        "reward_train/unpenalised": 2 / 3,
        "unlabelled_train": 1,
    }
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.reward for sample in read_scores(path, SAMPLES)] == labels.rewards


def test_without_a_penalty_a_list_is_all_there_is():
    labels = label_samples(lambda samples: [1.0, 2.0, 3.0, 4.0], SAMPLES, RewardConfig())
    assert labels == Labels([1.0, 2.0, 3.0, 4.0])
    assert make_score_rows(SAMPLES, labels)[1] == {
        "prompt_id": "p",
        "sample_id": 1,
        "reward": 2.0,
        "type": "score",
    }
    assert measure_labels(labels, "eval") == {"unlabelled_eval": 0}


def test_parts_and_counts_reach_the_rows_and_the_metrics():
    parts = {"long": [1.0, 2.0, None, 4.0], "short": [0.0, 0.0, 1.0, 1.0]}
    given = Labels([1.0, 2.0, None, 5.0], parts=parts, counts={"ties": 3})
    labels = label_samples(lambda samples: given, SAMPLES, RewardConfig(max_unlabelled=0.25))
    assert make_score_rows(SAMPLES, labels)[2]["parts"] == {"long": None, "short": 1.0}
    assert measure_labels(labels, "eval") == {
        "reward_eval/long": pytest.approx(7 / 3),
        "reward_eval/short": 0.5,
        "unlabelled_eval": 1,
        "ties_eval": 3,
    }


def test_too_many_without_a_reward_stop_the_run():
    def score(samples):
        return [None, 1.0, None, 1.0]

    assert label_samples(score, SAMPLES, RewardConfig(max_unlabelled=0.5)).unlabelled == 2
    with pytest.raises(RewardError, match=r"2 of 4 samples .* reward\.max_unlabelled=0\.4 "):
        label_samples(score, SAMPLES, RewardConfig(max_unlabelled=0.4))
    assert average_rewards([None, 1.0, None, 2.0]) == 1.5 and average_rewards([None]) == 0.0


def test_scores_of_other_samples_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    rows = make_score_rows(SAMPLES[::-1], Labels([1.0] * 4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecordError, match=r"scores\.jsonl line 1: .*'p', 3.*'p', 0"):
        read_scores(path, SAMPLES)


def test_labels_come_back_from_their_rows_and_are_joined(tmp_path):
    path = tmp_path / "scores.jsonl"
    parts = {"a": [1.0, 2.0, None, 4.0]}
    given = Labels([1.0, 2.0, None, 5.0], parts=parts, counts={"ties": 3})
    settings = RewardConfig(missing_eos_penalty=1.0, max_unlabelled=0.5)
    labels = label_samples(lambda samples: given, SAMPLES, settings)
    rows = make_score_rows(SAMPLES, labels)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_labels(path, SAMPLES)
    assert found.rewards == labels.rewards and found.raw == labels.raw == given.rewards
    assert found.parts == parts and not found.counts
    other = Labels([7.0], [8.0], {"a": [9.0]}, {"ties": 1, "asked": 2})
    joined = join_labels([labels, other])
    assert joined.rewards == [*labels.rewards, 7.0] and joined.raw == [*given.rewards, 8.0]
    assert joined.parts == {"a": [1.0, 2.0, None, 4.0, 9.0]}
    assert joined.counts == {"ties": 4, "asked": 2}
    assert join_labels([]) == Labels([])
