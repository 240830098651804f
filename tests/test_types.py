"""Records and pytrees: their examples hold, and what has another shape is refused in tests."""

import dataclasses
import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from halos_jax import types
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.types import CHOSEN, REJECTED, Batch, Item, TrainState

RECORDS = [
    one
    for _, one in inspect.getmembers(types, dataclasses.is_dataclass)
    if one.__module__ == types.__name__
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda one: one.__name__)
def test_each_record_has_an_example_that_holds(record):
    (found,) = doctest.DocTestFinder(recurse=False).find(record, globs=vars(types))
    assert found.examples[-1].want, "an example that shows no value"
    results = doctest.DocTestRunner(verbose=False).run(found)
    assert (results.attempted, results.failed) == (len(found.examples), 0)


def test_every_record_is_looked_at():
    names = {one.__name__ for one in RECORDS}
    assert {"Turn", "Prompt", "Sample", "Item", "Batch", "TrainState"} <= names
    assert len(names) == 13


@pytest.fixture
def batch():
    """Return a batch of one step with two pairs, `[m, rows, ...]`."""
    draw = lambda low, high: np.arange(low, high, dtype=np.int32)  # noqa: E731
    items = [Item(draw(1, 4), (draw(4, 9), draw(9, 11)), (CHOSEN, REJECTED))] * 2
    plan = plan_batches(items, batch_size=2, num_rows=2, tokens_per_row=64, row_multiple=8)
    return build_batch(items, plan, 0)


def test_response_positions_are_those_of_the_targets(batch):
    assert batch.is_response.sum(axis=-1).tolist() == [[7, 7]]
    assert batch.is_response[0, 0, :7].all()
    placed = jax.tree.map(jnp.asarray, batch)
    np.testing.assert_array_equal(placed.is_response, batch.is_response)


def test_arrays_of_another_shape_or_type_make_no_batch(batch):
    with pytest.raises(TypeCheckError, match="tokens"):
        dataclasses.replace(batch, tokens=batch.tokens.astype(np.float32))
    with pytest.raises(TypeCheckError, match="target"):
        dataclasses.replace(batch, target=batch.target[..., :-1])


def test_items_and_states_are_checked_as_they_are_made():
    with pytest.raises(TypeCheckError, match="prompt_ids"):
        Item(np.zeros((1, 3), np.int32), (), ())
    with pytest.raises(TypeCheckError, match="responses"):
        Item(np.zeros(3, np.int32), (np.zeros(2),), (CHOSEN,))
    with pytest.raises(TypeCheckError, match="step"):
        TrainState(jnp.zeros((2,), jnp.int32), {}, ())


def test_placeholders_pass(batch):
    assert isinstance(jax.tree.map(lambda x: x.shape, batch), Batch)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch).tokens.ndim == 3
