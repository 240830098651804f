"""Where a run compiles, it says so."""

import logging
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from halos_jax.console import compiling


@pytest.fixture
def watch(monkeypatch):
    watch = compiling._Watch()
    monkeypatch.setattr(compiling, "_watch", watch)
    monkeypatch.setattr(compiling, "_PATIENCE", 0.02)
    return watch


def test_a_long_compilation_is_said_and_a_short_one_is_not(watch, caplog):
    caplog.set_level(logging.INFO)
    watch.begin("/jax/core/compile/jaxpr_trace_duration", 0.0, fun_name="traced")
    watch.begin(compiling._EVENT, 0.0, fun_name="jit(short)")
    watch.end(compiling._EVENT, 0.01)
    watch.begin(compiling._EVENT, 0.0, fun_name="jit(train_step)")
    timer = watch._timers[threading.get_ident()]
    timer.join(5)
    watch.end(compiling._EVENT, 4.5)
    watch.end(compiling._EVENT, 0.5)  # of a compilation that began before the watch
    watch.end("/jax/other", 99.0)
    time.sleep(0.05)
    assert caplog.messages == ["compiling jit(train_step) ..."]
    assert compiling.take_seconds() == pytest.approx(5.01)
    assert compiling.take_seconds() == 0.0


def test_jax_tells_of_its_compilations():
    """The names of its events are the ones that are listened to; listening twice counts once."""
    compiling.watch_compilations()
    compiling.watch_compilations()
    compiling.take_seconds()
    began = time.monotonic()
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7))
    assert 0 < compiling.take_seconds() <= time.monotonic() - began


def test_a_compilation_that_raises_an_error_is_not_said_to_go_on(watch, caplog):
    """jax tells its beginning and no end."""
    caplog.set_level(logging.INFO)
    watch.begin(compiling._EVENT, 0.0, fun_name="jit(wrong)")
    watch.begin(compiling._EVENT, 0.0, fun_name="jit(right)")
    watch.end(compiling._EVENT, 0.01)
    watch.begin(compiling._EVENT, 0.0, fun_name="jit(wrong again)")
    compiling.forget_compilations()
    time.sleep(0.05)
    assert caplog.messages == [] and watch._timers == {}
