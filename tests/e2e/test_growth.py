"""A run goes on: with more to do, on other devices, with less memory, at another rate."""

import json
import shutil
import signal

import numpy as np
from safetensors.numpy import load_file

from tests.e2e.conftest import FLAGS
from tests.e2e.tampering import list_wrong

TWO_DEVICES = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2"}
LESS = (
    "train.tokens_per_device=64",
    "sampling.slots=4",
    "model.remat=full",
    "model.head_chunk=16",
)


def read_config(workdir):
    return json.loads((workdir / "config.json").read_text())


def read_samples(workdir, round):
    lines = (workdir / "rounds" / f"{round:04d}" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_final(workdir):
    return (workdir / "final" / "model.safetensors").read_bytes()


def test_a_finished_run_goes_on_with_more_prompts(program, finished, tmp_path):
    """With the warm-up of the longer run it is that run, to the bit."""
    workdir, (expected, _) = tmp_path / "run", finished
    warmup = "optimizer.warmup_steps=1"
    code, _, errors = program.run(workdir, warmup, "rounds.total_prompts=6")
    assert (code, errors) == (0, "")
    first = read_final(workdir)
    kill = {"2 sample: after sample_shard 2": signal.SIGKILL}
    code, _, _ = program.run(workdir, warmup, signals=kill)
    assert code == -signal.SIGKILL
    assert read_final(workdir) == first, "what there is stays until there is another one"
    (segment,) = read_config(workdir)["segments"]
    assert segment["changed"] == {"rounds.total_prompts": [6, 12]}
    assert (segment["round"], segment["exported"]) == (2, False)
    code, output, errors = program.run(workdir, warmup)
    assert (code, errors) == (0, "") and "nothing to do" not in output
    for round in (1, 2):
        assert read_samples(workdir, round) == read_samples(expected, round)
    assert read_final(workdir) == read_final(expected) != first
    assert read_config(workdir)["segments"][0]["exported"] is True
    code, output, _ = program.run(workdir, warmup)
    assert code == 0 and "is complete: nothing to do" in output
    code, _, errors = program.run(workdir, warmup, "rounds.total_prompts=6")
    assert code == 1 and "rounds.total_prompts: 12 -> 6 (it may only grow)" in errors


def test_a_run_goes_on_on_other_devices_and_with_less_memory(program, finished, tmp_path):
    """Killed on one device, again on two with less memory, it ends on two that lie otherwise."""
    workdir, (expected, _) = tmp_path / "run", finished
    kill = {"1 train: after train_step 2": signal.SIGKILL}
    assert program.run(workdir, signals=kill)[0] == -signal.SIGKILL
    mesh = ("mesh.data=1", "mesh.fsdp=2", *LESS)
    kill = {"2 train: after train_step 5": signal.SIGKILL}
    code, output, errors = program.run(workdir, *mesh, signals=kill, environment=TWO_DEVICES)
    assert code == -signal.SIGKILL, errors
    assert "mesh.fsdp: 1 -> 2; the results may differ in their last bits" in output
    assert "train.tokens_per_device: 16384 -> 64; the results may differ" in output
    mesh = ("mesh.data=2", "mesh.fsdp=1", *LESS)
    code, output, errors = program.run(workdir, *mesh, environment=TWO_DEVICES)
    assert (code, errors) == (0, "")
    assert "mesh.data: 1 -> 2; the results may differ" in output
    (one, other) = read_config(workdir)["segments"]
    assert (one["round"], other["round"]) == (1, 2)
    assert one["step"] < 3 <= other["step"] < 6, "of the last checkpoint that was complete"
    for round in (1, 2):
        for one, other in zip(
            read_samples(workdir, round), read_samples(expected, round), strict=True
        ):
            assert one["prompt_id"] == other["prompt_id"]
            assert one["response_ids"] == other["response_ids"]
    found, wanted = (
        load_file(folder / "final" / "model.safetensors") for folder in (workdir, expected)
    )
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=2e-3)


def test_a_change_holds_from_the_checkpoint_that_is_whole(program, finished, tmp_path):
    """The newest checkpoint is damaged in its arrays, which only the restore finds."""
    workdir = tmp_path / "run"
    kill = {"2 train: after train_step 6": signal.SIGKILL}
    assert program.run(workdir, signals=kill)[0] == -signal.SIGKILL
    before, *_, newest = sorted(
        path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )
    for path in newest.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    step = json.loads((before / "round" / "metadata").read_text())["round_state"]["step"]
    code, output, errors = program.run(workdir, "sampling.slots=4")
    assert (code, errors) == (0, "")
    assert f"{newest} is incomplete or corrupt" in output
    (segment,) = read_config(workdir)["segments"]
    assert segment["changed"] == {"sampling.slots": [8, 4]}
    assert (segment["round"], segment["step"]) == (2, step)
    manifest = json.loads((workdir / "rounds" / "0002" / "manifest.json").read_text())
    assert manifest["segments"] == [segment]
    assert read_final(workdir) == read_final(finished[0])


def test_after_a_loss_that_is_not_finite_a_smaller_rate_goes_on(program, finished, tmp_path):
    workdir, every = tmp_path / "run", "checkpoint.every=0"
    kill = {"2 train: before train_step 4": signal.SIGKILL}
    assert program.run(workdir, every, signals=kill)[0] == -signal.SIGKILL
    code, _, errors = program.run(workdir, every, "optimizer.learning_rate=1e30")
    assert code == 1 and "NonFiniteError: step" in errors and "run it again" in errors
    code, output, errors = program.run(workdir, every)
    assert (code, errors) == (0, "")
    assert "carrying on after round 1" in output
    assert "optimizer.learning_rate: 1e+30 -> 0.01; from here on" in output
    assert read_final(workdir) == read_final(finished[0]), "nothing of the bad steps is left"


def test_a_finished_run_goes_on_with_prompts_that_have_come(program, inputs, tmp_path):
    workdir, file = tmp_path / "run", tmp_path / "prompts.jsonl"
    lines = (inputs / "prompts.jsonl").read_text().splitlines(keepends=True)
    options = ("eval=", f"train={file}")
    options = [f"data.{option}" for option in options] + ["optimizer.warmup_steps=0"]
    file.write_text("".join(lines[:8]))
    code, output, errors = program.run(workdir, *options)
    assert (code, errors) == (0, "")
    assert "data.train: 8 prompts are enough for 2 of 2 rounds (rounds.total_prompts=12)" in output
    first = read_final(workdir)
    before = [read_samples(workdir, round) for round in (1, 2)]
    file.write_text("".join(lines[:11]))
    recorded = (workdir / "inputs.json").read_bytes()
    for event, count in (("before replace config.json", 0), ("before replace inputs.json", 1)):
        signals = {f"start: {event}": signal.SIGKILL}
        assert program.run(workdir, *options, signals=signals)[0] == -signal.SIGKILL
        assert len(read_config(workdir).get("segments", [])) == count
        assert (workdir / "inputs.json").read_bytes() == recorded
        assert list_wrong(workdir) == [], "what is not used yet is no difference"
    code, output, errors = program.run(workdir, *options)
    assert (code, errors) == (0, "")
    assert list_wrong(workdir) == [] and (workdir / "inputs.json").read_bytes() != recorded
    assert [read_samples(workdir, round) for round in (1, 2)] == before
    ids = [[row["prompt_id"] for row in rows] for rows in (*before, read_samples(workdir, 3))]
    assert [len(set(one)) for one in ids] == [6, 2, 3] and len(set().union(*ids)) == 11
    assert read_final(workdir) != first
    (segment,) = read_config(workdir)["segments"]
    assert segment["changed"] == {"data.train": ["8 prompts", "11 prompts"]}
    assert (segment["round"], segment["exported"]) == (3, True)
    code, output, _ = program.run(workdir, *options)
    assert code == 0 and "is complete: nothing to do" in output


def test_more_epochs_of_a_finished_task_and_data_that_were_moved(program, inputs, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copy(inputs / "sft.jsonl", old / "sft.jsonl")
    options = ["task=sft", "data.eval=", "optimizer.warmup_steps=0", "checkpoint.every=0"]
    code, _, errors = program.run(
        tmp_path / "whole", *options, f"data.train={old}/sft.jsonl", "train.epochs=2"
    )
    assert (code, errors) == (0, "")
    workdir = tmp_path / "run"
    assert program.run(workdir, *options, f"data.train={old}/sft.jsonl")[0] == 0
    first = read_final(workdir)
    old.rename(new)
    options += [f"data.train={new}/sft.jsonl", "train.epochs=2"]
    code, output, errors = program.run(workdir, *options)
    assert (code, errors) == (0, "")
    assert "train.epochs: 1 -> 2; the run goes on with more" in output
    assert "sft.jsonl'; its content is the same" in output and "carrying on after step" in output
    assert read_final(workdir) == read_final(tmp_path / "whole") != first
    (new / "sft.jsonl").write_text("".join(reversed((new / "sft.jsonl").open().readlines())))
    code, _, errors = program.run(workdir, *options[:-1], "train.epochs=3")
    assert code == 1 and "holds something else than it did" in errors
