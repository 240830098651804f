"""Staleness: of the policy that goes on, on the round's own samples."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from halos_jax.config import RoundsConfig, SamplingConfig
from halos_jax.data.records import formats
from halos_jax.rewards.labels import Labels, make_score_rows
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.stages import write_rows
from halos_jax.rounds.watch import after, watched
from halos_jax.types import Prompt, Sample, TrainState, Turn
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import round_folder
from halos_jax.workdir.timing import read_times
from tests.rounds.stand_ins import CONFIG, make_run

DONE = StageResult({"eval.jsonl": 4}, {"reward_eval": 0.5})
SAMPLES = [
    Sample(Prompt(f"p{i}", (Turn("user", "?"),)), k, "", (1, i), (k, 2), "stop", sum_logps=-3.0)
    for i in range(2)
    for k in range(2)
]


def make(tmp_path, count=-1, **parts):
    config = dataclasses.replace(
        CONFIG,
        sampling=SamplingConfig(temperature=1.0, top_p=1.0),
        rounds=RoundsConfig(watch_samples=count),
    )
    run, folder = make_run(workdir=tmp_path, config=config, **parts), round_folder(tmp_path, 3)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(run.workspace, folder / "samples.jsonl", map(formats.sample_to_record, SAMPLES))
    scores = make_score_rows(SAMPLES, Labels([0.0] * len(SAMPLES)))
    write_rows(run.workspace, folder / "scores.jsonl", scores)
    return run


def test_the_policy_as_trained_is_compared_with_the_one_that_sampled(tmp_path, monkeypatch):
    asked = []

    def compute(run, chosen, params, *, label):
        asked.append((params, [one.prompt.prompt_id for one in chosen]))
        return [-2.5, -3.5, -3.0, -4.0]

    monkeypatch.setattr(watched, "compute_sums", compute)
    run = make(tmp_path, ledger=open_ledger(tmp_path))
    params = {"embed": np.ones(2), "value": np.zeros(1)}
    state = TrainState(np.int32(7), params, (), ema={"embed": np.zeros(2)})
    found = after.add_staleness(run, state, DONE, 3)
    # Not the moving average, and not the value head.
    assert asked == [({"embed": params["embed"]}, ["p0", "p0", "p1", "p1"])]
    assert found.files == DONE.files and found.metrics["reward_eval"] == 0.5
    assert found.metrics["kl_stale"] == 0.25
    assert found.metrics["stale_ratio_max"] == 0.5
    weights = np.exp([0.5, -0.5, 0.0, -1.0])
    assert found.metrics["stale_ess"] == pytest.approx(weights.sum() ** 2 / 4 / (weights**2).sum())
    signs = {name: one for name, one in found.metrics.items() if name != "reward_eval"}
    assert run.writer.calls == [("write", 7, {"round": 3, **signs}), ("flush",)]
    assert all(map(math.isfinite, signs.values()))
    # Its time is a part of the round's.
    assert [(one["round"], one["stage"]) for one in read_times(tmp_path)] == [(3, "staleness")]


def test_nothing_is_watched_in_round_0_or_where_it_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "compute_sums", lambda *given, **named: pytest.fail("a pass"))
    state = SimpleNamespace(step=7, params={})
    assert after.add_staleness(make(tmp_path), state, DONE, 0) == DONE
    assert after.add_staleness(make(tmp_path, count=0), state, DONE, 3) == DONE
