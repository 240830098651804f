"""When a run saves inside of a stage."""

import pytest

from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.saver import Saver
from halos_jax.workdir.interrupt import Interrupted, StopSignal


class Calls:
    """Notes the calls of any method, in one list for several of them."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def make_saver(every):
    calls = []
    return Saver(Calls(calls), Calls(calls), StopSignal(), every), calls


def locate(step):
    return lambda: Position(step=10 + step, round=2, in_stage=True, stage_step=step)


def test_it_saves_every_so_many_steps_but_not_at_the_end():
    saver, calls = make_saver(every=2)
    for done in range(1, 5):
        saver.after_step(f"state {done}", done, 4, locate(done))
    assert calls == [("flush",), ("save", 12, "state 2", locate(2)().to_dict())]
    saver, calls = make_saver(every=0)
    for done in range(1, 5):
        saver.after_step("state", done, 4, locate(done))
    assert not calls


def test_a_stop_is_saved_waited_for_and_said():
    saver, calls = make_saver(every=0)
    saver.stop.handle()
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM in step 11; saved; run the same"):
        saver.after_step("state", 1, 4, locate(1))
    assert calls == [("flush",), ("save", 11, "state", locate(1)().to_dict()), ("finish",)]
    # After the last step the stage's end is saved instead.
    saver.after_step("state", 4, 4, locate(4))
    assert len(calls) == 3
