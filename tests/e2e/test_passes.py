"""Several passes over the prompts, with replay: every pass has each prompt once, killed or not."""

import collections
import json
import random

import pytest

from halos_jax.workdir import manifests
from tests.e2e.test_resume import assert_same_run, run_to_the_end

# 5 prompts in passes of 5; each round of 6 has prompts of two passes. The second one has 6 pairs of
# its own at most, and 2 of the first.
PASSES = ("data.max_train=5", "rounds.passes=3", "feedback.replay=0.25")


@pytest.fixture(scope="module")
def spread(program, tmp_path_factory):
    """Return the workdir of a run of three passes, its events, and what it said."""
    folder = tmp_path_factory.mktemp("passes")
    code, output, errors = program.run(folder / "run", *PASSES, trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines(), output


def read(workdir, round, name):
    path = workdir / "rounds" / f"{round:04d}" / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_prompt_comes_twice_in_a_pass(spread):
    workdir, _, output = spread
    used = collections.defaultdict(list)
    for round, passes in ((1, [1] * 5 + [2]), (2, [2] * 4 + [3] * 2)):
        rows = read(workdir, round, "samples.jsonl")
        assert [row.get("prompt_pass", 1) for row in rows[::3]] == passes
        manifest = manifests.load_manifest(workdir / "rounds" / f"{round:04d}")
        assert manifest.metrics["prompt_pass"] == sum(passes) / 6
        for row in rows[::3]:
            used[row.get("prompt_pass", 1)].append(row["prompt_id"].partition("#")[0])
        # The two samples of a pair are of one prompt of one pass.
        asked = {row["prompt_id"]: row["prompt_ids"] for row in rows}
        for pair in read(workdir, round, "feedback.jsonl"):
            assert asked[pair["prompt_id"]] == pair["prompt_ids"]
            assert pair.get("prompt_pass", 1) == int(pair["prompt_id"].partition("#")[2] or 1)
    assert len(set(used[1])) == 5 and set(used[2]) == set(used[1]) and set(used[3]) < set(used[1])
    assert len(set(used[3])) == 2 and used[1] != used[2]
    assert "12 in all (2.4 passes over 5 prompts)" in output


def test_a_round_trains_on_pairs_of_the_round_before(spread):
    workdir, _, output = spread
    first, own, again = (
        read(workdir, *place)
        for place in ((1, "feedback.jsonl"), (2, "feedback.jsonl"), (2, "replay.jsonl"))
    )
    assert read(workdir, 1, "replay.jsonl") == []
    assert len(again) == round(len(own) / 3) > 0
    for row in again:
        assert row.pop("replayed_round") == 1 and row in first
    manifest = manifests.load_manifest(workdir / "rounds" / "0002")
    assert manifest.decisions["replay"] == {"examples": len(again), "rounds": {"1": len(again)}}
    assert manifest.metrics["feedback_replayed"] == len(again)
    assert manifest.metrics["kl_stale_age/1"] > 0
    assert f"round 2: {len(own) + len(again)} pairs" in output


def test_a_prompt_that_a_round_has_twice_gets_other_samples(spread):
    rows = read(spread[0], 1, "samples.jsonl")
    samples = collections.defaultdict(dict)
    for row in rows:
        name, _, again = row["prompt_id"].partition("#")
        samples[name].setdefault(again, []).append(row["response_ids"])
    (twice,) = [one for one in samples.values() if len(one) == 2]
    assert twice[""] != twice["2"] and len(twice[""]) == len(twice["2"]) == 3


@pytest.mark.slow
def test_kill_between_the_passes(program, spread, tmp_path):
    expected, events, _ = spread
    once = [event for event in events if events.count(event) == 1 and event.startswith("2 ")]
    points = sorted(random.Random(6).sample(once, 2), key=once.index)
    assert run_to_the_end(program, tmp_path / "run", points, *PASSES) == points
    assert_same_run(tmp_path / "run", expected)
