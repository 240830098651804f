"""Rounds whose size the run chooses: the choices, their reasons, and what they hold through."""

import random

import pytest

from halos_jax.config import Config, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.outlook import choose_prompts_per_round
from halos_jax.workdir import manifests
from tests.e2e.test_resume import assert_same_run, choose_points, run_to_the_end

AUTO = (
    "rounds.prompts_per_round=auto",
    "rounds.min_prompts_per_round=1",
    "rounds.max_prompts_per_round=6",
    "optimizer.schedule=linear",
    "train.batch_size=1",
)
# What a size is chosen by.
CONFIG = Config(
    rounds=RoundsConfig(
        total_prompts=12,
        prompts_per_round="auto",
        min_prompts_per_round=1,
        max_prompts_per_round=6,
    ),
    sampling=SamplingConfig(num_samples_per_prompt=3),
    train=TrainConfig(batch_size=1),
)


def load_rounds(workdir):
    return [manifests.load_manifest(folder) for folder in sorted((workdir / "rounds").iterdir())]


@pytest.fixture(scope="module")
def chosen(program, tmp_path_factory):
    """Return the workdir of a run that chooses the sizes of its rounds, and its events."""
    folder = tmp_path_factory.mktemp("auto")
    code, _, errors = program.run(folder / "run", *AUTO, trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines()


def test_each_size_is_what_the_signs_of_the_rounds_before_ask_for(chosen):
    """The rate is so high that the policy leaves the samples of a long round behind."""
    workdir, _ = chosen
    _, *rounds = done = load_rounds(workdir)
    budget = Budget(12, 6)
    for one in rounds:
        found = choose_prompts_per_round(CONFIG, budget, done[: one.round], 20)
        decided = {"prompts_per_round": one.decisions["prompts_per_round"]}
        assert found == (one.stop - one.start, decided)
        budget = budget.open(one.round, one.start, one.stop)
    assert budget.opened[-1][1] == 12 and len(rounds) > 2
    first, second = (one.decisions["prompts_per_round"] for one in rounds[:2])
    assert first == {"prompts": 6, "reason": "the first round"}
    assert second["prompts"] == 3 and "had left the one that sampled it behind" in second["reason"]


def test_a_size_holds_through_kills(program, chosen, tmp_path):
    expected, events = chosen
    places = [event for event in events if events.count(event) == 1 and "manifest.json" in event]
    points = sorted(random.Random(6).sample(places, 3), key=places.index)
    assert run_to_the_end(program, tmp_path / "run", points, *AUTO) == points
    assert_same_run(tmp_path / "run", expected, per_round=0)


@pytest.mark.slow
def test_kill_at_twenty_random_instants(program, chosen, tmp_path):
    expected, events = chosen
    rng = random.Random(7)
    points = choose_points(events, 4, rng)
    points = sorted(rng.sample(points, 20), key=points.index)
    died = run_to_the_end(program, tmp_path / "run", points, *AUTO)
    assert len(died) >= 18
    assert_same_run(tmp_path / "run", expected, per_round=0)
