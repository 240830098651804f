import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from halos_jax import sharding
from halos_jax.errors import UserError
from halos_jax.processes import (
    OtherProcessError,
    decide_on_first,
    explain_loss,
    leave,
    run_on_all,
    run_on_first,
    take_text,
)


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


@pytest.fixture
def run_both(monkeypatch):
    """Return what runs a function of the process's number as two processes, threads here."""
    barrier, place, box = threading.Barrier(2, timeout=20), threading.local(), [None, None]

    def gather(value):
        box[place.number] = np.asarray(value)
        barrier.wait()
        found = np.stack(box)
        barrier.wait()
        return found

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    def run(function):
        def run_one(number):
            place.number = number
            try:
                return function(number)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run_one, range(2)))

    return run


class SmallError(UserError):
    pass


class LargeError(UserError):
    pass


def raiser(number, error_of):
    def action():
        if number in error_of:
            raise error_of[number]
        return number

    return lambda: run_on_all(action, SmallError, LargeError)


@pytest.mark.parametrize(
    ("errors", "kind", "text"),
    [
        ({0: SmallError("one")}, SmallError, "one"),
        ({1: SmallError("other")}, SmallError, "other"),
        ({0: SmallError("one"), 1: SmallError("other")}, SmallError, "one"),
        ({0: SmallError("one"), 1: LargeError("worse")}, LargeError, "worse"),
    ],
)
def test_what_fails_on_one_fails_on_all_with_one_message(run_both, errors, kind, text):
    found = run_both(lambda number: raiser(number, errors)())
    assert [(type(one), str(one)) for one in found] == [(kind, text)] * 2


def test_other_errors_are_raised_where_they_happen(run_both):
    errors = {0: SmallError("one"), 1: MemoryError("none left")}
    first, second = run_both(lambda number: raiser(number, errors)())
    assert type(second) is MemoryError
    assert type(first) is OtherProcessError and "process 1 of the job has stopped" in str(first)


def test_all_decide_as_the_first(run_both):
    assert run_both(lambda number: raiser(number, {})()) == [0, 1]
    assert (
        run_both(lambda number: decide_on_first(lambda: [number, None, "x"]))
        == [[0, None, "x"]] * 2
    )
    texts = ("", "längst")
    assert run_both(lambda number: take_text(texts[number])) == [""] * 2
    assert run_both(lambda number: take_text(texts[number], 1)) == ["längst"] * 2
    name = b"\xe9.jsonl".decode(errors="surrogateescape")  # as the system gives a name in latin-1
    assert run_both(lambda number: take_text(name)) == [r"\udce9.jsonl"] * 2
    found = run_both(lambda number: decide_on_first(raiser_of_one(number), SmallError))
    assert [str(one) for one in found] == ["second"] * 2, "not decided where one cannot"


def raiser_of_one(number):
    def action():
        if number:
            raise SmallError("second")
        return 7

    return action


def test_alone_errors_are_what_they_are():
    error = KeyError("x")
    with pytest.raises(KeyError) as caught:
        raiser(0, {0: error})()
    assert caught.value is error
    assert decide_on_first(lambda: 7) == 7 and take_text("x") == "x"


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
