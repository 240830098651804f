"""Staleness of what a round replays, by its age."""

import dataclasses

import pytest

from halos_jax.config import RoundsConfig, SamplingConfig
from halos_jax.data.records import formats
from halos_jax.rounds.replay.choose import FILE
from halos_jax.rounds.watch import replayed
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.manifests import round_folder
from tests.rounds.replay.test_choose import write_round
from tests.rounds.stand_ins import CONFIG, make_run


def make_samples(round):
    return [
        Sample(
            *(Prompt(f"r{round}p{i}", (Turn("user", "?"),)), k, "", (1, i), (k, 2), "stop"),
            sum_logps=-float(round),
        )
        for i in range(3)
        for k in range(2)
    ]


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a run whose round 4 replays one prompt of 1 and two of 3."""
    for round in (1, 2, 3):
        rows = map(formats.sample_to_record, make_samples(round))
        write_round(tmp_path, round, list(rows), "samples.jsonl")
    rows = [
        {"prompt_id": name, "replayed_round": int(name[1])} for name in ("r1p2", "r3p0", "r3p1")
    ]
    round_folder(tmp_path, 4).mkdir()
    formats.write_records(round_folder(tmp_path, 4) / FILE, rows)

    def make(count=-1, top_p=1.0):
        sampling = SamplingConfig(temperature=1.0, top_p=top_p)
        rounds = RoundsConfig(watch_samples=count)
        config = dataclasses.replace(CONFIG, sampling=sampling, rounds=rounds)
        return make_run(workdir=tmp_path, config=config)

    return make


def test_the_log_ratio_is_measured_by_age(make, monkeypatch):
    asked = []

    def compute(run, watched, params, *, label):
        asked.append([(one.prompt.prompt_id, one.sample_id) for one in watched])
        return [{"r1p2": -3.0, "r3p0": -5.0, "r3p1": -9.0}[name] for name, _ in asked[-1]]

    monkeypatch.setattr(replayed.watching, "compute_sums", compute)
    found = replayed.measure_replayed(make(), "params", 4)
    assert asked == [[(name, k) for name in ("r1p2", "r3p0", "r3p1") for k in (0, 1)]]
    # log p of the sampler less that of the policy now: -1 + 3, and -3 + 5 and -3 + 9.
    assert {name: one.value for name, one in found.items()} == {
        "kl_stale_age/1": (2 + 6) / 2,
        "kl_stale_age/3": 2.0,
    }
    assert list(replayed.measure_replayed(make(top_p=0.9), "params", 4)) == [
        "kl_sampled_stale_age/1",
        "kl_sampled_stale_age/3",
    ]


def test_no_more_are_watched_than_of_the_rounds_own(make):
    watched, ages = replayed.choose_watched(make(2), 4)
    assert len(watched) == 2 and ages == {"r1p2": 3, "r3p0": 1, "r3p1": 1}
    assert replayed.choose_watched(make(0), 4) == ([], {})
    assert replayed.choose_watched(make(), 5) == ([], {})
    assert replayed.measure_replayed(make(0), "params", 4) == {}
