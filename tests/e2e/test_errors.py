"""What a user can mend is one clear message and exit code 1; what was produced stays."""

import errno
import fcntl
import shutil
import subprocess

import pytest

from halos_jax.models.files import hf
from halos_jax.workdir import manifests
from tests.e2e.test_resume import WITH_TIMES


def fail(program, workdir, *overrides, **options) -> str:
    """Run what must fail; return its one message."""
    code, _, errors = program.run(workdir, *overrides, **options)
    assert code == 1, errors
    assert "Traceback" not in errors
    # One message: its first line names the error's type, and no other line starts one.
    lines = errors.splitlines()
    assert lines[0].split(":")[0].endswith("Error"), errors
    assert not [line for line in lines[1:] if line.split(":")[0].endswith("Error")], errors
    return errors


def test_config_errors_come_together_before_anything_else(program, tmp_path):
    message = fail(
        program,
        tmp_path / "run",
        "train.batchsize=4",
        "optimizer.learning_rate=-1",
        "model.path=/missing",
        "sampling.top_p=nucleus",
    )
    assert "3 errors" in message
    assert "train.batchsize" in message and "did you mean" in message and "batch_size" in message
    assert "optimizer.learning_rate: got -1" in message and "sampling.top_p" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_preset(program):
    process = program.start_with("--config=configs/missing.py")
    _, errors = process.communicate()
    assert process.returncode == 1 and len(errors.splitlines()) == 1
    assert "ConfigError: --config: got 'configs/missing.py'" in errors


def test_a_missing_model(program, tmp_path):
    assert "'/missing/model'" in fail(program, tmp_path / "run", "model.path=/missing/model")
    message = fail(program, tmp_path / "run2", f"reward.path={program.inputs / 'policy'}")
    assert "reward.path" in message and "classification" in message


def test_a_truncated_weight_file(program, inputs, tmp_path):
    shutil.copytree(inputs / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = fail(program, tmp_path / "run", f"model.path={tmp_path / 'policy'}")
    assert str(file) in message and "truncated" in message


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"prompt": [{"role": "user"', "line 3"),
        ('{"prompt": 7}', "field 'prompt'"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "end with the user's"),
    ],
)
def test_a_bad_prompt(program, inputs, tmp_path, line, expected):
    lines = (inputs / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    message = fail(program, tmp_path / "run", f"data.train={tmp_path / 'prompts.jsonl'}")
    assert f"{tmp_path / 'prompts.jsonl'} line 3" in message and expected in message


def test_held_out_prompts_that_are_trained_on(program, inputs, tmp_path):
    lines = (inputs / "eval.jsonl").read_text().splitlines()
    shared = (inputs / "prompts.jsonl").read_text().splitlines()[7]
    (tmp_path / "eval.jsonl").write_text("\n".join([*lines, shared]))
    message = fail(program, tmp_path / "run", f"data.eval={tmp_path / 'eval.jsonl'}")
    assert "data.eval: 1 of its prompts" in message


def test_sizes_that_do_not_divide_by_the_devices(program, tmp_path):
    flags = f"{program.environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    for overrides in (
        ("train.batch_size=12", "sampling.slots=20"),
        ("train.batch_size=12", "sampling.slots=20", "task=pipeline", "pipeline.tasks=online"),
    ):
        message = fail(program, tmp_path / "run", *overrides, environment={"XLA_FLAGS": flags})
        assert "train.batch_size: got 12" in message and "train.batch_size=16" in message
        assert "sampling.slots: got 20" in message
    message = fail(program, tmp_path / "run", "mesh.tensor=3", environment={"XLA_FLAGS": flags})
    assert "8 devices" in message
    assert not (tmp_path / "run").exists()


def test_reward_functions(program, tmp_path):
    kind = "reward.kind=function"
    message = fail(program, tmp_path / "a", kind, "reward.function=tests.e2e.rewards:missing")
    assert "reward.function" in message and "cannot be imported" in message
    workdir = tmp_path / "b"
    message = fail(program, workdir, kind, "reward.function=tests.e2e.rewards:score_badly")
    assert "got nan for prompt" in message and "a finite number" in message
    assert sorted(path.name for path in (workdir / "rounds" / "0000").iterdir()) == [
        "eval.shard-0000.jsonl",
        "eval.shard-0001.jsonl",
    ]


def test_a_workdir_that_is_a_file(program, tmp_path):
    (tmp_path / "run").write_text("mine")
    message = fail(program, tmp_path / "run")
    assert str(tmp_path / "run") in message and "--config.workdir=DIR" in message
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_in_use_or_of_another_run(program, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)

    def read() -> dict:
        files = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.read_bytes() for path in files}

    before = read()
    message = fail(program, workdir, "rounds.prompts_per_round=4", "sampling.top_p=0.9")
    assert "rounds.prompts_per_round: 6 -> 4" in message
    assert "sampling.top_p: 1.0 -> 0.9" in message
    with open(workdir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another job" in fail(program, workdir)
    assert read() == before
    # What may change is no error; a run that is complete has nothing to do, and stays as it is.
    code, output, _ = program.run(workdir, "checkpoint.keep=2", "train.log_every=7")
    assert code == 0 and "nothing to do" in output
    assert read()[workdir / "config.json"] == before[workdir / "config.json"]


@pytest.mark.parametrize(
    "event",
    [
        "1 sample: before fsync rounds/0001/samples.shard-0001.jsonl.partial",
        "1 score: before replace rounds/0001/scores.jsonl",
        "after 1 feedback: before fsync rounds/0001/manifest.json.partial",
        "after export: before fsync .final.partial/model.safetensors",
    ],
)
def test_a_full_disk_loses_nothing(program, finished, tmp_path, event):
    """The disk is full at one write; with space again the run goes on to the same end."""
    workdir = tmp_path / "run"
    assert event in finished[1]
    message = fail(program, workdir, faults={event: errno.ENOSPC})
    assert "No space left" in message and "free some space" in message
    done = {path: path.read_bytes() for path in workdir.rglob("*.jsonl")}
    assert not list(workdir.rglob("*.jsonl.partial")) and not list(workdir.glob("final*"))
    code, _, errors = program.run(workdir)
    assert (code, errors) == (0, "")
    for path, content in done.items():
        other = "shard" in path.name or path.name in ("metrics.jsonl", *WITH_TIMES)
        grown = path.name == "ledger.jsonl" and path.read_bytes().startswith(content)
        assert other or grown or path.read_bytes() == content
    final = [folder / "final" / "model.safetensors" for folder in (workdir, finished[0])]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_a_full_file_system(program, finished, tmp_path):
    """The same without any help: a file system of a few pages, made larger afterwards."""
    workdir = tmp_path / "small" / "run"
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        larger = ["mount", "-o", "remount,size=304k", str(tmp_path / "small")]
        try:
            # Too small for checkpoints, which is said before anything is sampled; for two alone,
            # which is said where a third one is written, or a file beside it.
            assert "free, but a peak of 2 more checkpoints takes" in fail(program, workdir)
            assert not (workdir / "rounds").exists()
            subprocess.run(larger, check=True)
            message = fail(program, workdir)
            assert "is full" in message and " free" in message and "same command again" in message
            subprocess.run([*larger[:2], "remount,size=64m", larger[-1]], check=True)
            _finish(program, workdir, finished[0])
        finally:
            subprocess.run(["umount", str(tmp_path / "small")], check=True)
    else:  # no right to mount: a limit on the size of a file
        assert "File too large" in fail(program, workdir, file_limit=12_000)
        _finish(program, workdir, finished[0])


def _finish(program, workdir, expected):
    assert not (workdir / "final").exists()
    code, _, errors = program.run(workdir)
    assert (code, errors) == (0, "")
    for name in ("samples", "scores", "feedback", "eval"):
        files = [folder / "rounds" / "0002" / f"{name}.jsonl" for folder in (workdir, expected)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(program, finished, tmp_path):
    workdir = tmp_path / "run"
    message = fail(program, workdir, "optimizer.learning_rate=1e30")
    assert "step 2" in message and "last good checkpoint" in message
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["00000001"]
    manifest = manifests.load_manifest(workdir / "rounds" / "0001")
    assert manifest.next_stage == "train"


def test_the_exported_policy_is_a_model(finished):
    assert hf.load_decoder_config(str(finished[0] / "final")).num_labels == 0
