"""Names of a state's arrays, and the lines that say how two sets of them differ."""

import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.checkpoints.arrays import compare_arrays, describe_array, name_arrays
from halos_jax.types import TrainState


def test_arrays_are_named_by_their_paths_and_what_is_none_has_no_name():
    state = TrainState(
        step=jnp.int32(3),
        params={"layers": {"q": np.zeros((2, 3), np.float32)}},
        opt_state=(jnp.zeros(2, jnp.bfloat16),),
    )
    found = {name: describe_array(leaf) for name, leaf in name_arrays(state).items()}
    assert found == {
        "step": ((), "int32"),
        "params/layers/q": ((2, 3), "float32"),
        "opt_state/0": ((2,), "bfloat16"),
    }
    with pytest.raises(TypeError, match="params/x: got str, allowed: arrays"):
        name_arrays({"params": {"x": "text"}})


def test_every_difference_is_a_line():
    wanted = {"a": ((2,), "float32"), "b": ((2,), "float32"), "d": ((), "int32")}
    found = {"a": ((3,), "float32"), "c": ((1, 2), "int32"), "d": ((), "int32")}
    assert compare_arrays(wanted, found, "this run", "checkpoint") == [
        "a: this run float32[2], checkpoint float32[3]",
        "b: missing (this run: float32[2])",
        "c: extra (checkpoint: int32[1, 2])",
    ]
