"""Scores are kept shard by shard, and mean the same however the samples were split."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

from halos_jax import sharding
from halos_jax.config import Config, RewardConfig, SamplingConfig
from halos_jax.data.records import reading
from halos_jax.rewards.labels import RewardError
from halos_jax.tasks import scoring
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.ledger import no_ledger


def make_samples():
    """Return 2 samples of each of 5 prompts, a prompt's not side by side."""
    prompts = [Prompt(f"p{i}", (Turn("user", f"question {i}"),)) for i in range(5)]
    return [
        Sample(prompt, number, "x" * (index + number), (1,), (2,), "stop")
        for number in range(2)
        for index, prompt in enumerate(prompts)
    ]


def make_run(workdir, scorer, stop=None, **reward):
    """Return a workspace and the scorer."""
    workspace = SimpleNamespace(
        workdir=workdir,
        config=Config(
            sampling=SamplingConfig(shard_prompts=2),
            reward=RewardConfig(**{"kind": "function"} | reward),
        ),
        stop=stop or StopSignal(),
        is_writer=True,
        ledger=no_ledger(),
    )
    return workspace, scorer


def test_a_shard_is_whole_prompts_and_is_scored_once(tmp_path):
    asked, samples, stop = [], make_samples(), StopSignal()

    def score(found):
        asked.append([one.prompt.prompt_id for one in found])
        if len(asked) == 2:
            stop.handle()
        return [float(len(one.output)) for one in found]

    with pytest.raises(Interrupted):
        scoring.write_scores(*make_run(tmp_path, score, stop), samples)
    assert asked == [["p0", "p1"] * 2, ["p2", "p3"] * 2]
    files, metrics, _ = scoring.write_scores(*make_run(tmp_path, score), samples)
    assert asked[2:] == [["p4", "p4"]] and files == {"scores.jsonl": 10}
    lines = [record for _, record in reading.read_records(tmp_path / "scores.jsonl")]
    assert [line["reward"] for line in lines] == [float(len(one.output)) for one in samples]
    assert metrics == {"reward_label": 2.5, "unlabelled_label": 0}
    scoring.remove_score_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_shards_of_another_size_are_scored_again(tmp_path):
    asked, samples, stop = [], make_samples(), StopSignal()

    def score(found):
        asked.append([one.prompt.prompt_id for one in found])
        stop.handle()
        return [float(len(one.output)) for one in found]

    with pytest.raises(Interrupted):
        scoring.write_scores(*make_run(tmp_path, score, stop), samples)
    run, _ = make_run(tmp_path, score)
    run.config = dataclasses.replace(run.config, sampling=SamplingConfig(shard_prompts=3))
    scoring.write_scores(run, score, samples)
    assert asked == [["p0", "p1"] * 2, ["p0", "p1", "p2"] * 2, ["p3", "p4"] * 2]
    lines = [record for _, record in reading.read_records(tmp_path / "scores.jsonl")]
    assert [line["reward"] for line in lines] == [float(len(one.output)) for one in samples]


@pytest.mark.parametrize(
    "reward", [{"kind": "judge"}, {"parts": {"a": {"function": "x:y", "normalise": "file"}}}]
)
def test_rewards_that_depend_on_each_other_are_asked_for_at_once(tmp_path, reward):
    samples, asked = make_samples(), []

    def score(found):
        asked.append(list(found))
        return [1.0] * len(found)

    scoring.write_scores(*make_run(tmp_path, score, **reward), samples)
    assert asked == [samples]


def test_processes_score_alike_however_late_one_of_them_is(tmp_path, monkeypatch):
    """Two threads stand for two processes, of which the second looks for each shard last."""
    barrier, waits, found = threading.Barrier(2, timeout=10), {}, {}

    def wait_for_all(what):
        waits.setdefault(threading.current_thread().name, []).append(what)
        barrier.wait()

    def run_process(name):
        run, score = make_run(tmp_path, lambda shard: [float(len(one.output)) for one in shard])
        run.is_writer = name == "0"
        run.stop = SimpleNamespace(check=lambda: None if run.is_writer else time.sleep(0.2))
        found[name] = scoring.score_in_shards(run, score, make_samples())

    monkeypatch.setattr(sharding, "wait_for_all", wait_for_all)
    threads = [threading.Thread(target=run_process, args=name, name=name) for name in "01"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waits["0"] == waits["1"] and found["0"] == found["1"]


def test_unlabelled_samples_are_counted_over_all_shards(tmp_path):
    def score(found):  # all of the first shard but one
        return [None if int(s.prompt.prompt_id[1]) + s.sample_id < 2 else 1.0 for s in found]

    samples = make_samples()
    with pytest.raises(RewardError, match="3 of 10 samples have no reward"):
        scoring.write_scores(*make_run(tmp_path, score), samples)
    assert len(list(tmp_path.glob("scores.shard-*"))) == 3
    _, metrics, _ = scoring.write_scores(*make_run(tmp_path, None, max_unlabelled=0.3), samples)
    assert metrics == {"reward_label": 1.0, "unlabelled_label": 3}
    lines = [record for _, record in reading.read_records(tmp_path / "scores.jsonl")]
    assert [line["reward"] for line in lines].count(None) == 3
