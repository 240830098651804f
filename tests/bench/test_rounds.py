"""The case of a whole round: every stage has its seconds, and nothing is left behind."""

import dataclasses
from pathlib import Path

import pytest

from halos_jax.bench.rounds import run_round_case
from halos_jax.bench.workloads import get_case
from halos_jax.workdir.interrupt import StopSignal


def test_every_stage_has_its_seconds(config, mesh):
    case = dataclasses.replace(get_case("round_1b", tiny=True), examples=8, samples=2)
    found = run_round_case(case, config, mesh, StopSignal())
    stages = {name: value for name, value in found.items() if name.startswith("seconds_")}
    expected = {f"seconds_{name}" for name in ("sample", "score", "feedback", "train", "staleness")}
    assert stages.keys() == expected and all(value > 0 for value in stages.values())
    counted = found["in_no_stage"] * found["seconds"] + sum(stages.values())
    assert counted == pytest.approx(found["seconds"])
    assert 0 <= found["in_no_stage"] < 1
    assert not (Path(config.workdir) / "round").exists()
