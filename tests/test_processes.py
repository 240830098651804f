import threading

import jax
import pytest

from halos_jax import sharding
from halos_jax.errors import UserError
from halos_jax.processes import OtherProcessError, explain_loss, leave, run_on_first


@pytest.fixture
def job(monkeypatch):
    """Return what makes this the process `number` of a job, of which the first may have failed."""

    def make(number, *, failed=False):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        told = []
        monkeypatch.setattr(
            sharding, "take_from_first", lambda value: told.append(value) or (value or failed)
        )
        return told

    return make


def fail():
    raise UserError("the disk is full")


def test_alone_it_is_the_action(monkeypatch):
    assert run_on_first(lambda: 7) == 7
    with pytest.raises(UserError, match="the disk is full"):
        run_on_first(fail)


def test_the_others_hear_whether_the_first_has_failed(job):
    told = job(0)
    assert run_on_first(lambda: 7) == 7
    with pytest.raises(UserError, match="the disk is full"):
        run_on_first(fail)
    assert told == [False, True], "the others must hear of it before it is raised"
    job(1)
    assert run_on_first(fail) is None
    job(1, failed=True)
    with pytest.raises(OtherProcessError, match="process 0 of the job has stopped"):
        run_on_first(fail)


def test_who_leaves_waits_for_the_others_for_a_while(job, monkeypatch):
    assert leave(0.0), "a process alone has nobody to wait for"
    job(1)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    assert leave(5.0)
    forever = threading.Event()
    monkeypatch.setattr(jax.distributed, "shutdown", forever.wait)
    assert not leave(0.05)
    forever.set()


LOST = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1234"


def test_the_loss_of_another_process_is_one_line(job):
    error = jax.errors.JaxRuntimeError(LOST)
    assert explain_loss(error) is None, "nobody is lost where there is one process"
    job(3)
    assert explain_loss(error).startswith("OtherProcessError: process 3 has lost another process")
    assert LOST in explain_loss(error)
    for other in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        ValueError(LOST),
    ):
        assert explain_loss(other) is None
    assert len(explain_loss(jax.errors.JaxRuntimeError(LOST + "x" * 9999))) < 500
