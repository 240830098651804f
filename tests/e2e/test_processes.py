"""A job of two processes, as on a cluster: one result, written once, and carried on together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import FLAGS, ROOT
from tests.e2e.origins import assert_drawn_by_the_policy

OVERRIDES = ("mesh.distributed=true", "mesh.fsdp=2", "mesh.data=1")


def find_address() -> str:
    """Return an address for the coordinator of a job on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(program, workdir: Path, *overrides: str) -> list[subprocess.Popen]:
    """Start the two processes, a device each, of one job."""
    address = find_address()
    command = [sys.executable, "-m", "halos_jax.main"]
    command += program.arguments(workdir, *OVERRIDES, *overrides)
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            command,
            env={**program.environment, **joined, "JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[list[str]]:
    """Wait for the processes to end with `code`; return the lines of the errors of each."""
    found = [process.communicate(timeout=300) for process in processes]
    for process, (output, errors) in zip(processes, found, strict=True):
        if process.returncode and "Multiprocess computations aren't implemented" in errors:
            pytest.fail("this jaxlib has no collectives between processes on CPU")
        assert process.returncode == code, output + errors
    own = [line for line in found[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert own == [], "process 0 speaks for all"
    # The line in which jax says that it has heard of a signal is worth having.
    return [
        [line for line in errors.splitlines() if "preemption_notifier" not in line]
        for _, errors in found
    ]


def read_metrics(workdir: Path):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does(program, finished, tmp_path):
    workdir, (alone, _) = tmp_path / "run", finished
    assert finish(start(program, workdir)) == [[], []], "a clean end is quiet"
    assert_drawn_by_the_policy(workdir)
    start_of = [
        json.loads((folder / "rounds" / "0000" / "manifest.json").read_text())["trained"]
        for folder in (workdir, alone)
    ]
    assert start_of[0] == start_of[1], "one fingerprint, by one process or by two"
    for round in ("0001", "0002"):
        for name in ("samples.jsonl", "feedback.jsonl"):
            path = Path("rounds") / round / name
            ours = [json.loads(line) for line in (workdir / path).read_text().splitlines()]
            theirs = [json.loads(line) for line in (alone / path).read_text().splitlines()]
            for one, other in zip(ours, theirs, strict=True):
                for key in ("response_ids", "ids_A", "ids_B", "prompt_id"):
                    assert one.get(key) == other.get(key)
    for one, other in zip(read_metrics(workdir), read_metrics(alone), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        np.testing.assert_allclose(one.get("loss/train", 0), other.get("loss/train", 0), rtol=1e-4)
    ours, theirs = (
        load_file(folder / "final" / "model.safetensors") for folder in (workdir, alone)
    )
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=2e-3)


def test_a_refusal_of_the_first_process_ends_all(program, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    first, other = finish(start(program, workdir, "seed=3"), code=1)
    assert first[:2] == [
        f"WorkdirError: workdir: {workdir} holds a run with another configuration; changed:",
        "  - seed: 0 -> 3",
    ]
    assert other == ["OtherProcessError: process 0 of the job has stopped; its log says why"]


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_in_one_process_ends_all_at_one_step(program, tmp_path):
    workdir = tmp_path / "run"
    processes = start(program, workdir, "checkpoint.every=0", "train.epochs=200")
    while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < 4:
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGINT)
    first, second = finish(processes, code=75)
    (line,) = first
    step = re.fullmatch(r"Interrupted: stopped by SIGTERM in round 1, stage train, (.*)", line)[1]
    assert second[-1] == f"Interrupted: stopped by Ctrl-C in round 1, stage train, {step}"
    assert [line for line in second[:-1] if line] == [
        "Ctrl-C: stopping where the run can be resumed; press again to end it now"
    ]
    (saved,) = (workdir / "checkpoints").iterdir()
    record = json.loads((saved / "round" / "metadata").read_text())["round_state"]
    assert step == f"step {record['step']}; saved; run the same command again to carry on"


@pytest.mark.parametrize("how", ["deleted", "flipped"])
def test_a_chunk_that_one_process_cannot_read_is_damage_for_both(tmp_path, how):
    """One process finds the damage; both take the checkpoint before it, or end alike."""
    script, address = Path(__file__).with_name("two_restores.py"), find_address()
    folder = tmp_path / "checkpoints"
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(number), folder, how],
            env={**os.environ, "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    lines = [
        [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for output, _ in found
    ]
    assert all(line["seconds"] < 60 for both in lines for line in both)
    values = np.random.default_rng(1).random(1 << 20, np.float32)
    first, second = ({key: one[0][key] for key in ("step", "value")} for one in lines)
    assert first == {"step": 1, "value": float(values[7])}
    assert second == {"step": 1, "value": float(values[(1 << 19) + 7])}
    message, other = (one[1]["error"] for one in lines)
    assert message == other
    assert message.startswith(f"{folder}/00000001 is incomplete or corrupt (")
    assert message.endswith(
        "; no other one is left; put its files back, or start a new run with --config.workdir=DIR"
    )
    assert "00000002 is incomplete" in found[0][1] and "going on from" in found[0][1]
