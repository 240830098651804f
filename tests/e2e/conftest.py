"""What the runs of whole programs share: a tiny policy, a tiny reward model, prompts.

And what the tests of every loss share: one compiled program that is any of them.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from halos_jax.config import ToyConfig
from halos_jax.data.toy import make_toy_data
from halos_jax.losses import Loss, LossTerms
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from tests.compilation import QUICK_FLAGS, add_flags

TOY = ToyConfig(num_sft=8, num_pairs=32, num_prompts=20, num_eval=4)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Return a folder with policy/, reward/, base/ (Hugging Face format) and the toy data."""
    folder = tmp_path_factory.mktemp("inputs")
    make_toy_data(folder, TOY, seed=0)
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SMALL))
    language_model = hf.load_decoder_config(str(folder / "base"))
    for name, labels, seed in (("policy", 0, 1), ("reward", 1, 2)):
        config = dataclasses.replace(language_model, num_labels=labels, init_std=0.2)
        params = spec.init_params(jax.random.key(seed), config)
        export.save_model(params, config, folder / name, source=folder / "base")
    return folder


@pytest.fixture(scope="session")
def judge():
    """Yield the address of a judge that gives every answer 7 of 10."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            message = {"message": {"content": "Final Score: 7"}, "finish_reason": "stop"}
            body = json.dumps({"choices": [message]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


ROOT = Path(__file__).parents[2]
# One device, quick compilation, and programs that are compiled once for all processes.
FLAGS = add_flags("", QUICK_FLAGS)


@dataclasses.dataclass(frozen=True)
class Program:
    """Starts the program on the tiny preset, as the command line does."""

    inputs: Path
    environment: Mapping[str, str]
    server: subprocess.Popen
    logs: Path

    def arguments(self, workdir: Path, *overrides: str) -> list[str]:
        """Return the command line's arguments."""
        preset = f"{Path(__file__).with_name('tiny.py')}:{self.inputs}"
        paths = [f"--config={preset}", f"--config.workdir={workdir}"]
        return paths + [f"--config.{override}" for override in overrides]

    def start(self, workdir: Path, *overrides: str) -> subprocess.Popen:
        """Start a process of its own."""
        return self.start_with(*self.arguments(workdir, *overrides))

    def start_with(self, *arguments: str) -> subprocess.Popen:
        """Start a process of its own with any arguments."""
        return subprocess.Popen(
            [sys.executable, "-m", "halos_jax.main", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir: Path, *overrides: str, **options) -> tuple[int, str, str]:
        """Run in a fork of the server; return exit code, stdout and stderr.

        Options (see fork_server.py): `signals` and `faults` map events to what happens there,
        `trace` is the file to which all events are written; `file_limit`, `environment`.
        """
        return self.run_with(self.arguments(workdir, *overrides), workdir, **options)

    def run_with(self, arguments: Sequence[str], workdir: Path, **options) -> tuple[int, str, str]:
        """Run any arguments in a fork of the server, as `run` does."""
        defaults = {
            "signals": {},
            "faults": {},
            "trace": None,
            "file_limit": None,
            "environment": {},
        }
        if options.keys() - defaults:
            raise TypeError(f"unknown: {options.keys() - defaults}")
        logs = [self.logs / name for name in ("stdout", "stderr")]
        request = {
            **defaults,
            **options,
            "arguments": list(arguments),
            "workdir": str(workdir),
            "stdout": str(logs[0]),
            "stderr": str(logs[1]),
        }
        self.server.stdin.write(json.dumps(request, default=str) + "\n")
        self.server.stdin.flush()
        code = json.loads(self.server.stdout.readline())["code"]
        return code, *(log.read_text() for log in logs)


@pytest.fixture(scope="session")
def program(inputs, tmp_path_factory):
    """Yield the Program on `inputs`."""
    environment = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Program(inputs, environment, server, tmp_path_factory.mktemp("logs"))
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="session")
def finished(program, tmp_path_factory):
    """Return the workdir of a run that nothing stopped, and its events in order."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, _, errors = program.run(folder / "run", trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines()


@pytest.fixture(scope="session")
def choose():
    """Return `choose_loss`."""
    return choose_loss


def choose_loss(losses: Sequence[Loss], index) -> Loss:
    """Return a loss that is `losses[index]`, where the index may be known only when it runs.

    The model takes most of the time that a step takes to compile: so it is compiled once for all
    losses that read the same of it. Metrics, whose names differ, are left out.
    """

    def compute(inputs, batch):
        branches = [lambda both, loss=loss: loss(*both)[0] for loss in losses]
        share = jax.lax.switch(index, branches, (inputs, batch))
        return LossTerms(share * batch.num_examples, {})

    def measure(inputs, batch):
        shapes = {}
        for loss in losses:
            shapes |= jax.eval_shape(loss.measure, inputs, batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        branches = [lambda both, loss=loss: zeros | loss.measure(*both) for loss in losses]
        return jax.lax.switch(index, branches, (inputs, batch))

    return dataclasses.replace(
        losses[0],
        name="any",
        function=compute,
        reference=any(loss.reference for loss in losses),
        old=any(loss.old for loss in losses),
        per="example",
        statistics=measure,
    )
