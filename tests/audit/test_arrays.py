"""The arrays of checkpoints are read whole."""

import jax.numpy as jnp
import pytest

from halos_jax.audit.arrays import check_arrays
from halos_jax.checkpoints.store import open_checkpoints

STATE = {"params": {"w": jnp.arange(4096.0), "b": jnp.ones(3, jnp.bfloat16)}}


@pytest.fixture
def saved(made):
    checkpoints = open_checkpoints(made.workdir / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, STATE, {"round": step})
    checkpoints.close()
    return made


def test_every_array_of_every_checkpoint_is_read(saved):
    (finding,) = check_arrays(saved.open())
    assert (finding.outcome, finding.checked, finding.why) == ("passed", 4, "")


def test_a_byte_that_was_flipped_is_found(saved):
    files = (saved.workdir / "checkpoints" / "00000001" / "state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    (finding,) = check_arrays(saved.open())
    assert finding.outcome == "differs" and finding.why.startswith("00000001: ")


def test_a_run_without_checkpoints_has_none_to_read(made):
    assert list(check_arrays(made.open())) == []
