"""Rounds that get further prompts: as a round that had them from the start, killed or not."""

import json
import random

import pytest

from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import round_folder
from tests.e2e.test_resume import assert_same_run, choose_points, run_to_the_end

THRESHOLD = "feedback.threshold=0.8"  # which a third of the prompts exceed
REFILL = (
    THRESHOLD,
    "rounds.prompts_per_round=2",
    "feedback.min_examples=2",
    "feedback.max_prompts_factor=4",
    "optimizer.schedule=linear",
    "train.batch_size=1",
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_rounds(workdir):
    folders = sorted((workdir / "rounds").iterdir())[1:]
    return [manifests.load_manifest(folder) for folder in folders]


@pytest.fixture(scope="module")
def refilled(program, tmp_path_factory):
    """Return the workdir of a run whose rounds were refilled, and its events."""
    folder = tmp_path_factory.mktemp("refilled")
    code, _, errors = program.run(folder / "run", *REFILL, trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines()


def test_a_refilled_round_is_one_that_had_its_prompts_from_the_start(program, refilled, tmp_path):
    workdir, _ = refilled
    found = load_rounds(workdir)
    assert [one.start for one in found] == [0, *(one.stop for one in found[:-1])]
    assert found[-1].stop == 12 and (found[0].stop, len(found)) == (6, 3)
    for one in found:
        extents = one.decisions["refill"]["extents"]
        examples = [extent["examples"] for extent in extents]
        assert all(number < 2 for number in examples[:-1]) and examples == sorted(examples)
        assert one.decisions["refill"]["ended"] == (
            "enough" if examples[-1] >= 2 else "no prompts left"
        )
        assert one.metrics["feedback_pairs"] == examples[-1]
        assert one.metrics["feedback_extensions"] == len(extents) - 1
        assert one.metrics["feedback_refilled"] == one.stop - one.start - 2
    code, _, errors = program.run(tmp_path / "whole", THRESHOLD)
    assert (code, errors) == (0, "")
    # A reward model's scores round differently in batches of other sizes.
    refilled, whole = (round_folder(folder, 1) for folder in (workdir, tmp_path / "whole"))
    name = "samples.jsonl"
    assert (refilled / name).read_bytes() == (whole / name).read_bytes()
    scores = [
        [one["reward"] for one in read(folder / "scores.jsonl")] for folder in (refilled, whole)
    ]
    assert len(scores[0]) == 18 and scores[0] == pytest.approx(scores[1], abs=1e-5)
    pairs = [
        [
            (one["prompt_id"], one["output_A"], one["output_B"], one["label"])
            for one in read(folder / "feedback.jsonl")
        ]
        for folder in (refilled, whole)
    ]
    assert len(pairs[0]) == 2 and pairs[0] == pairs[1]


def test_the_rate_decays_with_the_share_of_the_prompts(refilled):
    """A linear decay; of the 12 steps expected at the start, one is warm-up, from a tenth."""
    records = read(refilled[0] / "metrics.jsonl")
    found = [one["counters/lr"] for one in records if "counters/lr" in one]
    expected = []
    for one in load_rounds(refilled[0]):
        steps = one.metrics["feedback_pairs"]  # in batches of one
        shares = [(one.start + (one.stop - one.start) * n / steps) / 12 for n in range(steps)]
        expected += [1e-2 * (1 - share) for share in shares]
    expected[0] *= 0.1
    assert len(found) >= 4 and found == pytest.approx(expected, rel=1e-6)


def test_kill_between_the_extents_of_a_round(program, refilled, tmp_path):
    expected, events = refilled
    points = [event for event in events if ".extent-" in event and events.count(event) == 1]
    assert len(points) > 50
    points = sorted(random.Random(4).sample(points, 3), key=points.index)
    assert run_to_the_end(program, tmp_path / "run", points, *REFILL) == points
    assert_same_run(tmp_path / "run", expected, per_round=0)


@pytest.mark.slow
def test_kill_at_twenty_random_instants(program, refilled, tmp_path):
    expected, events = refilled
    rng = random.Random(5)
    points = choose_points(events, 4, rng)
    points = sorted(rng.sample(points, 20), key=points.index)
    died = run_to_the_end(program, tmp_path / "run", points, *REFILL)
    assert len(died) >= 18
    assert_same_run(tmp_path / "run", expected, per_round=0)
