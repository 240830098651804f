"""Shapes waste little, and the plans of like rounds meet in the same ones."""

import collections

import numpy as np
import pytest

from halos_jax.data.batches import plan_batches
from halos_jax.data.layout import round_shape
from halos_jax.types import CHOSEN, REJECTED, Item


def test_shapes_recur_between_the_plans_of_like_rounds():
    def draw(rng):
        sizes = np.clip(rng.lognormal(np.log(150), 0.6, 3), 4, 512).astype(int)
        prompt, *responses = (np.ones(size, np.int32) for size in sizes)
        return Item(prompt, tuple(responses), (CHOSEN, REJECTED))

    layouts = collections.Counter()
    for number in range(10):
        rng = np.random.default_rng(number)
        items = [draw(rng) for _ in range(512)]
        plan = plan_batches(items, batch_size=32, num_rows=1, tokens_per_row=16384, seed=number)
        layouts[plan.layout] += 1
        assert plan.fill > 0.75
    assert len(layouts) <= 7, "with exact shapes there would be 10"


@pytest.mark.parametrize(("parts", "waste"), [(2, 1 / 2), (4, 1 / 4), (8, 1 / 8)])
def test_round_shape_wastes_little_and_never_shrinks(parts, waste):
    for multiple in (1, 8, 24, 128):
        rounded = [round_shape(size, multiple, parts=parts) for size in range(1, 3000)]
        assert rounded == sorted(rounded)
        for size, got in enumerate(rounded, 1):
            assert got >= size and got % multiple == 0
            assert got - size < size * waste + multiple
    assert len({round_shape(size, 1, parts=parts) for size in range(1025, 2049)}) == parts
