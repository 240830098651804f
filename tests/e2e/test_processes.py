"""A job of two processes, as on a cluster: one result, written once, and carried on together."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

OVERRIDES = ("mesh.distributed=true", "mesh.fsdp=2", "mesh.data=1")


def start(program, workdir: Path, *overrides: str) -> list[subprocess.Popen]:
    """Start the two processes, a device each, of one job."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "halos_jax.main"]
    command += program.arguments(workdir, *OVERRIDES, *overrides)
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            command,
            env={**program.environment, **joined, "JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode and "Multiprocess computations aren't implemented" in output:
            pytest.fail("this jaxlib has no collectives between processes on CPU")
        assert process.returncode == 0, output


def read_metrics(workdir: Path):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does(program, finished, tmp_path):
    workdir, (alone, _) = tmp_path / "run", finished
    finish(start(program, workdir))
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
