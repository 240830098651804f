"""A run that starts from a round of another one; and HALOs' rounds by hand, command by command."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.workdir import manifests
from halos_jax.workdir.trees import describe_tree
from tests.e2e.test_online import order_ids, read_ids

KILLED = "1 train: before train_step 2"
COUNTS = ["opt_state/1/2/count", "step"]  # of the schedule, and of the run
ROUND = (
    "task=pipeline",
    "pipeline.tasks=('sample','label','align')",
    "pipeline.overrides.label.data.train={workdir}/sample/samples.jsonl",
    "pipeline.overrides.align.data.train={workdir}/label/feedback.jsonl",
    "pipeline.overrides.align.data.eval=",
    "sampling.num_prompts=6",
)


def read_state(workdir, save_id=None):
    """Return the arrays of a checkpoint, the newest by default, by name."""
    checkpoints = read_checkpoints(workdir / "checkpoints")
    try:
        save_id = checkpoints.latest() if save_id is None else save_id
        specs = checkpoints._read_specs(save_id)
        wanted = {
            name: np.empty(shape, jax.numpy.dtype(dtype)) for name, (shape, dtype) in specs.items()
        }
        return checkpoints._read_arrays(save_id, wanted)
    finally:
        checkpoints.close()


def run_by_hand(program, workdir, number, *overrides):
    code, output, errors = program.run(
        workdir,
        *ROUND,
        f"sampling.round={number}",
        f"pipeline.overrides.align.train.round={number}",
        f"optimizer.warmup_steps={2 - number}",  # of the expected 6 steps of the run, 1
        f"rounds.num_skip={6 * (number - 1)}",
        *overrides,
    )
    assert (code, errors) == (0, ""), output
    return output


def test_two_rounds_by_hand_are_those_of_an_online_run(program, inputs, finished, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_by_hand(program, one, 1)
    run_by_hand(
        program,
        two,
        2,
        f"pipeline.overrides.sample.model.path={one}/align",
        f"pipeline.overrides.align.model.path={one}/align",
        f"pipeline.overrides.align.model.reference={inputs}/policy",
        f"pipeline.overrides.align.branch.workdir={one}/align",
    )
    for number, folder in ((1, one), (2, two)):
        samples = folder / "sample" / "samples.jsonl"
        online = finished[0] / "rounds" / f"{number:04d}" / "samples.jsonl"
        keys = ("prompt_id", "output", "ids")
        ours, theirs = (
            [[json.loads(line).get(key) for key in keys] for line in file.read_text().splitlines()]
            for file in (samples, online)
        )
        assert ours == theirs
    ours, theirs = read_state(two / "align"), read_state(finished[0])
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert sorted(different) == COUNTS  # the second command counts its own steps


@pytest.mark.slow
def test_a_branch_goes_on_from_another_run_which_it_reads_alone(program, finished, tmp_path):
    origin, workdir = tmp_path / "first", tmp_path / "second"
    shutil.copytree(finished[0], origin)
    before = describe_tree(origin)
    overrides = (
        f"branch.workdir={origin}",
        "branch.round=2",
        "rounds.total_prompts=6",
        "optimizer.warmup_steps=0",
        "data.eval=",
    )
    code, _, _ = program.run(workdir, *overrides, signals={KILLED: signal.SIGKILL})
    assert code == -signal.SIGKILL and describe_tree(origin) == before
    start, theirs = read_state(workdir, 1), read_state(origin)
    for name in start.keys() - {*COUNTS}:
        np.testing.assert_array_equal(start[name], theirs[name], err_msg=name)
    assert [int(start[name]) for name in COUNTS] == [0, 0]
    first = manifests.load_manifest(workdir / "rounds" / "0000")
    trained = manifests.load_manifest(origin / "rounds" / "0002").trained
    assert first.trained == first.origin["fingerprint"] == trained
    assert (first.origin["workdir"], first.origin["round"]) == (str(origin), 2)
    # It is resumed and verified when that run is gone.
    shutil.move(origin, tmp_path / "gone")
    code, output, errors = program.run(workdir, *overrides)
    assert (code, errors) == (0, "") and "round 0 is the policy of the branch" in output
    assert read_ids(workdir, 1) == order_ids(program)[12:18]  # those of round 3 of the other run
    assert manifests.load_manifest(workdir / "rounds" / "0001").policy == "branch"
    code, output, errors = program.run(workdir, *overrides, "mode=verify", "verify.steps=-1")
    assert (code, errors) == (0, "") and ", 0 differs, " in output
    code, _, errors = program.run(workdir, *overrides[:1], "branch.round=1", *overrides[2:])
    assert code == 1 and "branch.round: 2 -> 1" in errors
