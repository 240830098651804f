"""What a loss is given: the example holds, and arrays that do not fit each other are refused."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from halos_jax.losses import LossInputs, LossTerms, terms


def test_the_example_holds():
    globs = {"jnp": jnp, "LossInputs": LossInputs}
    (found,) = doctest.DocTestFinder(recurse=False).find(LossInputs, globs=globs)
    results = doctest.DocTestRunner(verbose=False).run(found)
    assert (results.attempted, results.failed) == (3, 0) and terms.LossInputs is LossInputs


def test_arrays_of_other_shapes_make_no_inputs():
    logps = np.zeros((2, 5), np.float32)
    assert LossInputs(policy=logps, reference=logps, scores=logps[:, :3]).old is None
    for others in (
        {"reference": logps[:, :-1]},
        {"old": logps[:-1]},
        {"values": logps.astype(np.float16)},
        {"scores": logps[0]},
        {"statistics": {"kl": (logps, logps)}},
    ):
        (name,) = others
        with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
            LossInputs(policy=logps, **others)


def test_microbatches_may_be_taken_together_or_apart():
    whole = LossInputs(policy=jnp.zeros((3, 2, 5)), statistics={"kl": (jnp.ones(3), jnp.ones(3))})
    sums = jax.lax.map(lambda one: one.policy.sum(axis=-1), whole)
    assert sums.shape == (3, 2)
    with pytest.raises(TypeCheckError, match="value"):
        LossTerms(jnp.zeros((3,)), {})
