"""A run that starts from a round of another one; and HALOs' rounds by hand, command by command."""

import json

import jax
import numpy as np

from halos_jax.checkpoints.store import read_checkpoints

# The schedule of the whole run, in two parts: its warm-up in the first one.
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
    # The second command counts its own steps.
    assert all(name == "step" or name.endswith("count") for name in different), different
