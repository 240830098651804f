"""What room is asked for: a checkpoint's while there is training to do, else the policy's."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from halos_jax import processes
from halos_jax.checkpoints.space import require_room
from halos_jax.storage import WorkdirError
from halos_jax.types import TrainState

MIB = 2**18  # numbers of four bytes


def make_state(ema=None):
    """Return a state of a policy of 1 MiB, a value head of 2 and moments of 4."""

    def array(size):
        return jax.ShapeDtypeStruct((size, MIB), jnp.float32)

    params = {"embedding": array(1), "value": {"first": array(2)}}
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=array(4),
        ema=ema and {"embedding": array(ema)},
    )


def ask(monkeypatch, tmp_path, free, **options):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_room(tmp_path, options.pop("state", make_state()), **options)


def test_a_run_that_trains_needs_room_for_a_checkpoint(tmp_path, monkeypatch):
    needed = 7 * 2**20 + 4
    ask(monkeypatch, tmp_path, needed, is_trained=False)
    with pytest.raises(WorkdirError, match=r"has 7.0 MiB free, but a checkpoint takes 7.0 MiB"):
        ask(monkeypatch, tmp_path, needed - 1, is_trained=False)


def test_a_run_that_keeps_its_best_round_needs_room_for_one_more(tmp_path, monkeypatch):
    needed = 2 * (7 * 2**20 + 4)
    ask(monkeypatch, tmp_path, needed, is_trained=False, checkpoints=2)
    with pytest.raises(WorkdirError, match=r"but a peak of 2 more checkpoints takes 14.0 MiB"):
        ask(monkeypatch, tmp_path, needed - 1, is_trained=False, checkpoints=2)


def test_a_run_that_only_exports_needs_room_for_the_policy_alone(tmp_path, monkeypatch):
    ask(monkeypatch, tmp_path, 2**20, is_trained=True)
    with pytest.raises(WorkdirError, match=r"but the exported model takes 1.0 MiB"):
        ask(monkeypatch, tmp_path, 2**20 - 1, is_trained=True)
    # A moving average is exported in the place of the policy, and as large.
    ask(monkeypatch, tmp_path, 2**20, is_trained=True, state=make_state(ema=1))


def test_a_disk_that_is_full_for_one_process_stops_them_all(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "run_on_all", lambda action, *kinds: asked.append(kinds))
    ask(monkeypatch, tmp_path, 0, is_trained=True)
    assert asked == [(WorkdirError,)]
