"""Held-out and test prompts in whole runs: never trained on, through kills and growth."""

import json
import random
import shutil
import signal

import pytest

from halos_jax.data import datasets
from halos_jax.workdir import manifests
from tests.e2e.test_resume import assert_same_run, choose_points, run_to_the_end

FUNCTION = "halos_jax.data.toy:score_by_rule"


@pytest.fixture(scope="module")
def overrides(inputs):
    """Three rounds of 4 of 16 prompts; every second is watched on 4 others, by two scorers."""
    return (
        "rounds.prompts_per_round=4",
        "rounds.eval_every=2",
        "data.eval=",
        "rounds.keep_best=false",
        "data.holdout=4",
        f"data.test={inputs / 'eval.jsonl'}",
        "data.max_test=3",
        "eval.test_temperature=0",
        "eval.scorers.rule.kind=function",
        f"eval.scorers.rule.function={FUNCTION}",
        f"eval.scorers.model.path={inputs / 'reward'}",
        "eval.scorers.model.max_length=16",
        "eval.scorers.model.compute_dtype=float32",
    )


@pytest.fixture(scope="module")
def whole(program, overrides, tmp_path_factory):
    """Return the workdir of such a run that nothing stopped, and its events in order."""
    folder = tmp_path_factory.mktemp("watched")
    code, _, errors = program.run(folder / "run", *overrides, trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines()


def read(workdir, round, name):
    path = workdir / "rounds" / f"{round:04d}" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def list_ids(rows):
    return list(dict.fromkeys(row["prompt_id"] for row in rows))


def load(workdir, round):
    return manifests.load_manifest(workdir / "rounds" / f"{round:04d}")


def test_each_policy_is_measured_where_and_when_it_should_be(whole, inputs):
    workdir, _ = whole
    held = list_ids(read(workdir, 0, "eval"))
    trained = [one for round in (1, 2, 3) for one in list_ids(read(workdir, round, "samples"))]
    every = [one.prompt_id for one in datasets.load_prompts(str(inputs / "prompts.jsonl"))]
    assert len(held) == 4 and len(set(trained)) == 12 and not set(held) & set(trained)
    assert set(held) | set(trained) <= set(every)
    has_eval = ["reward_eval" in load(workdir, round).metrics for round in range(4)]
    has_test = ["reward_test" in load(workdir, round).metrics for round in range(4)]
    assert has_eval == [True, False, True, True] and has_test == [True, False, False, True]
    for round in (2, 3):
        rows = read(workdir, round, "eval")
        assert list_ids(rows) == held and len(rows) == 12
        # The reward is that of the model, which is a scorer here as well.
        assert all(row["scores"]["model"] == pytest.approx(row["reward"], 1e-4) for row in rows)
    tested = [read(workdir, round, "test") for round in (0, 3)]
    assert [len(rows) for rows in tested] == [3, 3]  # greedily, and so once
    assert list_ids(tested[0]) == list_ids(tested[1])
    assert not set(list_ids(tested[0])) & {*held, *trained}
    last, wins = load(workdir, 3).metrics, []
    for before, after in zip(*tested, strict=True):
        difference = after["reward"] - before["reward"]
        wins.append(0.5 * (1 + (difference > 0) - (difference < 0)))
    assert last["win_rate_test"] == pytest.approx(sum(wins) / 3)
    rewards = [row["reward"] for row in tested[1]]
    assert last["reward_test"] == pytest.approx(sum(rewards) / 3)
    assert last["reward_test/low"] < last["reward_test"] < last["reward_test/high"]


def test_a_run_killed_where_it_is_watched_or_tested_ends_as_if_it_had_not_been(
    program, overrides, whole, tmp_path
):
    expected, events = whole
    places = ("0 evaluate", "3 evaluate")
    tests = ("3 final_test", "after 3 final_test")
    wanted = [one for one in events if one.partition(":")[0] in (*places, *tests)]
    points = choose_points(wanted, 1, random.Random(4))
    points += choose_points([one for one in wanted if one.startswith(tests)], 2, random.Random(5))
    points = sorted(set(points), key=events.index)
    died = run_to_the_end(program, tmp_path / "run", points, *overrides)
    assert_same_run(tmp_path / "run", expected, per_round=4)
    assert {event.partition(":")[0] for event in died} >= {"0 evaluate", *tests}


def test_what_is_held_out_stays_so_when_the_data_grow(program, overrides, inputs, tmp_path):
    workdir, data = tmp_path / "run", tmp_path / "prompts.jsonl"
    lines = (inputs / "prompts.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines[:12]) + "\n")
    overrides = (*overrides, f"data.train={data}", "rounds.eval_every=1")
    code, _, errors = program.run(workdir, *overrides, "rounds.total_prompts=8")
    assert (code, errors) == (0, "")
    held = list_ids(read(workdir, 0, "eval"))
    first = [read(workdir, 2, "test"), (workdir / "final" / "model.safetensors").read_bytes()]
    shutil.copy(inputs / "prompts.jsonl", data)
    shard = "rounds/0004/test.shard-0000.jsonl"
    kill = {f"4 final_test: after replace {shard}": signal.SIGKILL}
    code, _, errors = program.run(workdir, *overrides, "rounds.total_prompts=16", signals=kill)
    assert code == -signal.SIGKILL, errors
    trace = tmp_path / "trace"
    code, _, errors = program.run(workdir, *overrides, "rounds.total_prompts=16", trace=trace)
    assert (code, errors) == (0, "")
    # The shard of the test that was there is not sampled again.
    events = [one for one in trace.read_text().splitlines() if "final_test: before" in one]
    assert sum("sample_shard" in one for one in events) == 1
    trained = [one for round in range(1, 5) for one in list_ids(read(workdir, round, "samples"))]
    assert len(set(trained)) == 16 and not set(held) & set(trained)
    assert list_ids(read(workdir, 4, "eval")) == held
    # What was tested then is kept; the policy that final/ holds now is tested, too.
    assert read(workdir, 2, "test") == first[0] and "reward_test" in load(workdir, 4).metrics
    assert (workdir / "final" / "model.safetensors").read_bytes() != first[1]
    code, _, errors = program.run(workdir, *overrides, "data.holdout=5")
    assert code == 1 and "data.holdout: 4 -> 5" in errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.holdout=20",), "data.holdout: got 20, but data.train has 20 distinct prompts"),
        (("data.test={inputs}/prompts.jsonl", "data.max_test=0"), "are in data.train too"),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_anything_is_run(
    program, overrides, inputs, tmp_path, changes, message
):
    changes = [change.format(inputs=inputs) for change in changes]
    for mode in ("run", "check"):
        code, _, errors = program.run(tmp_path / "run", *overrides, *changes, f"mode={mode}")
        assert code == 1 and message in errors
