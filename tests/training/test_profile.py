"""A trace of some optimizer steps."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from halos_jax.config import Config
from halos_jax.training import loop
from halos_jax.training.profile import Profiler


def take_steps(profiler, count):
    step = jax.jit(lambda x: x * 2 + 1)
    for _ in range(count):
        profiler.step({"loss": step(jnp.ones(3))})
    profiler.close()


def test_the_steps_after_the_first_ones_are_traced_once(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(tmp_path, 2)
    take_steps(profiler, 2)  # of a round of two steps
    assert calls == [] and "no step is traced so far" in caplog.messages[-1]
    take_steps(profiler, 2)
    folder = str(tmp_path / "profile")
    assert calls == [folder, "stop"]
    assert caplog.messages[-1] == (
        f"train.profile: 1 of 2 steps are traced in {folder}: there were no more"
    )
    take_steps(profiler, 9)
    assert len(calls) == 2 and len(caplog.messages) == 2
    take_steps(Profiler(tmp_path, 2), 9)
    assert calls[2:] == [folder, "stop"]
    assert caplog.messages[2:] == [f"train.profile: 2 steps are traced in {folder}"]
    take_steps(Profiler(tmp_path, 0), 9)
    assert len(calls) == 4 and len(caplog.messages) == 3


def test_a_trace_is_one_that_xprof_reads(tmp_path):
    """`plugins/profile/TIME/HOST.xplane.pb`, with the steps' program in it."""
    take_steps(Profiler(tmp_path, 2), 6)
    [file] = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"/host:CPU" in file.read_bytes()


def test_a_trace_is_kept_if_a_step_raises_an_error(tmp_path, monkeypatch):
    """The loop of steps closes it; what was traced is worth most then."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    steps = [object()] * 9

    def train_step(state, frozen, batch):
        if len(calls) == 1:
            raise FloatingPointError("not finite")
        return state, {"loss": jnp.ones(())}

    monkeypatch.setattr(loop, "stream_batches", lambda mesh, dataset, start: iter(steps))
    monkeypatch.setattr(loop, "_measure_work", lambda trainer, items: (1, 1.0))
    trainer = SimpleNamespace(
        config=Config(progress=False),
        mesh=None,
        decoder=SimpleNamespace(compute_dtype="float32"),
        frozen=None,
        watched=range(0),
        train_step=train_step,
        profiler=Profiler(tmp_path, 2),
    )
    dataset = SimpleNamespace(plan=Plan([[]] * 9), items=[])
    writer = SimpleNamespace(write=lambda step, values: None)
    with pytest.raises(FloatingPointError):
        loop.run_steps(trainer, None, dataset, held_out=None, writer=writer)
    assert calls == ["start", "stop"]


class Plan(list):
    """Stands for a plan of steps."""

    @property
    def steps(self):
        return list(self)
