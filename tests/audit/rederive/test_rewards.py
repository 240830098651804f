"""Scores made again."""

import dataclasses
import json

import pytest

from halos_jax.audit.rederive import rewards
from halos_jax.audit.rederive.compare import EXACT, Tolerance
from halos_jax.audit.rederive.judges import answer_from_cache
from halos_jax.config import Config, RewardConfig
from halos_jax.config.rewards import JudgeConfig, PartConfig
from halos_jax.data.records import formats as records
from halos_jax.rewards.judge import cache as answers
from halos_jax.rewards.judge import scorer as judging
from halos_jax.rewards.judge.prompts import make_question
from halos_jax.rounds.context import Rollouts, StageResult
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.changes import History
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.manifests import FileRecord, Manifest
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace

CONFIG = Config(reward=RewardConfig(kind="function", function="a:b"))


class Replica:
    """The folder of a round, and one for what is made again."""

    def __init__(self, folder):
        self.root = folder

    def folder(self, round):
        return self.root / f"{round:04d}"

    def make_folder(self, name):
        (self.root / name).mkdir()
        return self.root / name


def make_rollouts(folder, scorer, config=CONFIG):
    info = RunInfo(folder, False, True, History(config), no_ledger(folder))
    return Rollouts(Workspace(config, info, None, StopSignal()), None, scorer)


def make_round(folder, scores):
    """Write a round of one prompt with these recorded scores."""
    (folder / "0001").mkdir()
    prompt = Prompt("p", (Turn("user", "a"),))
    samples = [Sample(prompt, one, "x" * one, (1,), (2,), "stop") for one in range(len(scores))]
    records.write_records(folder / "0001" / "samples.jsonl", map(records.sample_to_record, samples))
    rows = [
        {"prompt_id": "p", "sample_id": one, "reward": score, "type": "score"}
        for one, score in enumerate(scores)
    ]
    records.write_records(folder / "0001" / "scores.jsonl", rows)
    mean = sum(scores) / len(scores)
    metrics = {"reward_train_mean": mean, "unlabelled_train": 0}
    return Manifest(1, stop=1, files={"scores.jsonl": FileRecord("", 3)}, metrics=metrics)


def score(samples):
    return [float(len(sample.output)) for sample in samples]


def check(tmp_path, scores, scorer=score, config=CONFIG, **changes):
    manifest = dataclasses.replace(make_round(tmp_path, scores), **changes)
    rollouts = make_rollouts(tmp_path, scorer, config)
    return rewards.check_scores(Replica(tmp_path), rollouts, manifest, is_same=False)


def test_the_rewards_of_a_function_come_out_again(tmp_path):
    assert [one.outcome for one in check(tmp_path, [0.0, 1.0, 2.0])] == ["passed", "passed"]


def test_an_edited_score_is_found_whatever_it_was_computed_on(tmp_path):
    found = check(tmp_path, [0.0, 1.5, 2.0])
    assert [one.outcome for one in found] == ["differs", "differs"]
    assert found[0].why.startswith("line 2 reward: 1.5 is recorded, 1.0 is what it follows to be")
    assert found[1].why.startswith("reward_train_mean: 1.16")


def test_each_extent_is_scored_by_itself(tmp_path):
    asked = []

    def note(samples):
        asked.append([sample.sample_id for sample in samples])
        return score(samples)

    config = dataclasses.replace(
        CONFIG, sampling=dataclasses.replace(CONFIG.sampling, num_samples_per_prompt=1)
    )
    extents = [{"stop": 2, "examples": 1, "counts": {}}, {"stop": 3, "examples": 2, "counts": {}}]
    decisions = {"refill": {"extents": extents, "ended": "enough"}}
    found = check(tmp_path, [0.0, 1.0, 2.0], note, config, decisions=decisions)
    assert asked == [[0, 1], [2]]
    assert [one.outcome for one in found] == ["passed", "passed"]


def test_a_judge_whose_answers_are_gone_is_not_checked(tmp_path):
    config = dataclasses.replace(CONFIG, reward=RewardConfig(kind="judge"), workdir=str(tmp_path))
    (found,) = check(tmp_path, [0.0, 1.0, 2.0], config=config)
    assert found.outcome == "not checked"
    assert found.why == f"the judge's answers are gone: {tmp_path / 'judge.jsonl'}"


def test_only_models_may_round_otherwise():
    assert rewards.find_tolerance(CONFIG) == EXACT
    model = RewardConfig(kind="model", compute_dtype="float32")
    assert rewards.find_tolerance(Config(reward=model)) == Tolerance(1e-4, 1e-4)
    parts = {"a": PartConfig(kind="function"), "b": PartConfig(compute_dtype="bfloat16")}
    mixed = RewardConfig(kind="function", parts=parts)
    assert rewards.find_tolerance(Config(reward=mixed)) == Tolerance(0.02, 0.05)


@pytest.mark.parametrize(("value", "outcome"), [(1.0, "passed"), (1.5, "differs")])
def test_the_metrics_of_the_manifest_are_compared(value, outcome):
    manifest = Manifest(1, metrics={"a": 1.0, "other": 3})
    found = rewards.check_metrics("x", manifest, StageResult({}, {"a": value}), EXACT, is_same=True)
    assert (found.outcome, found.amount) == (outcome, "1 metrics")


@pytest.mark.parametrize(("is_same", "outcome"), [(True, "differs"), (False, "passed")])
def test_a_share_that_a_tie_decides_may_differ_on_another_device(is_same, outcome):
    manifest = Manifest(1, metrics={"win_rate_eval": 0.5, "reward_eval": 1.0})
    done = StageResult({}, {"win_rate_eval": 0.52, "reward_eval": 1.0})
    close = Tolerance(1e-4, 1e-4)
    found = rewards.check_metrics("held-out", manifest, done, close, is_same=is_same)
    assert found.outcome == outcome
    edited = StageResult({}, {"win_rate_eval": 0.5, "reward_eval": 1.1})
    wrong = rewards.check_metrics("held-out", manifest, edited, close, is_same=is_same)
    assert wrong.outcome == "differs"


OTHER = {"text": "Final Score: 3"}


def write_answers(path, settings, count):
    """Write a judge's answers to the samples of `make_round`: the score of sample 2 is 2."""
    question, prompt = make_question(settings), Prompt("p", (Turn("user", "a"),))
    cache = answers.AnswerCache(path)
    for number in range(count):
        body = judging._make_body(settings, question(prompt, "x" * number))
        text = {"text": f"Final Score: {number}", "finish_reason": "stop", "model": settings.model}
        cache.put(answers.make_key(settings.url, body, 0), text)


def hash_again(answer):
    answer.pop("sha256")
    return answers._seal(answer)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda answer: answer, ""),
        (
            lambda answer: answer | {"text": "Final Score: 3"},
            "line 3 reward: 2.0 is recorded, None",
        ),
        (
            lambda answer: hash_again(answer | {"text": "Final Score: 3"}),
            "line 3 reward: 2.0 is recorded, 3.0",
        ),
    ],
)
def test_an_edited_answer_of_a_judge_is_found(tmp_path, edit, why):
    """By the hash of its line; or, if that was made again, by the score that it gave."""
    settings = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", mode="score", lowest=0.0)
    reward = RewardConfig(kind="judge", judge=settings, max_unlabelled=1.0)
    config = Config(workdir=str(tmp_path), reward=reward)
    path = tmp_path / "judge.jsonl"
    write_answers(path, settings, 3)
    lines = list(map(json.loads, path.read_text().splitlines()))
    lines[2] = edit(lines[2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = answer_from_cache(config, tmp_path)
    found = check(tmp_path, [0.0, 1.0, 2.0], judging.make_judge_scorer(config), config)
    assert [one.outcome for one in found] == ["differs" if why else "passed"] * 2
    assert found[0].why.startswith(why)
