"""The view's gathers against plain indexing, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.attention import view as views
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.types import CHOSEN, MEMBER, REJECTED, Item


@pytest.fixture(params=["pairs", "groups"])
def view(request):
    """Return the view of a batch in which prompts are shared and rows differ in fill."""
    rng = np.random.default_rng(0)
    roles = {"pairs": (CHOSEN, REJECTED), "groups": (MEMBER,) * 4}[request.param]
    draw = lambda: np.ones(rng.integers(1, 12), np.int32)  # noqa: E731
    items = [Item(draw(), tuple(draw() for _ in roles), roles) for _ in range(5)]
    plan = plan_batches(items, batch_size=5, num_rows=2, tokens_per_row=512, row_multiple=8)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), build_batch(items, plan, 0))
    assert len(batch.view.buckets) > 1
    return batch.view


def plain_take(x, indices):
    """Gather with a row of zeros behind the last, as jax differentiates it: by scatter-add."""
    padded = jnp.pad(x, ((0, 0), (0, 1), *((0, 0) for _ in x.shape[2:])))
    return padded[jnp.arange(x.shape[0])[:, None], indices]


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def to_entries(x, view):
    """Return the entries of all buckets one behind the other."""
    parts = views.to_view(x, view.indices, view.inverse, view.buckets)
    return views.join_buckets(parts, x.shape[0])


def split(y, view):
    """Cut `[rows, M, ...]` into the buckets."""
    rows, bounds = y.shape[0], np.cumsum([count * length for count, length in view.buckets])
    parts = jnp.split(y, bounds[:-1], axis=1)
    return tuple(
        part.reshape(rows * count, length, *y.shape[2:])
        for part, (count, length) in zip(parts, view.buckets, strict=True)
    )


def test_to_view_and_its_gradient_equal_plain_indexing(view):
    rows, _, tokens = view.inverse.shape
    x, weights = draw(0, rows, tokens, 3, 2), draw(1, *view.indices.shape, 3, 2)
    ours = lambda x: to_entries(x, view)  # noqa: E731
    np.testing.assert_array_equal(ours(x), plain_take(x, view.indices))
    got = jax.jit(jax.grad(lambda x: (ours(x) * weights).sum()))(x)
    plain = lambda x: (plain_take(x, view.indices) * weights).sum()  # noqa: E731
    expected = jax.jit(jax.grad(plain))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_from_view_and_its_gradient_equal_plain_indexing(view):
    rows, entries = view.owned.shape
    y, weights = draw(0, rows, entries, 3, 2), draw(1, *view.owner.shape, 3, 2)
    back = lambda y: views.from_view(split(y, view), view.owner, view.owned, view.buckets)  # noqa: E731
    np.testing.assert_array_equal(back(y), plain_take(y, view.owner))
    got = jax.jit(jax.grad(lambda y: (back(y) * weights).sum()))(y)
    plain = lambda y: (plain_take(y, view.owner) * weights).sum()  # noqa: E731
    expected = jax.jit(jax.grad(plain))(y)
    np.testing.assert_array_equal(got, expected)


def test_there_and_back_leaves_real_tokens_and_clears_the_others(view):
    rows, _, tokens = view.inverse.shape
    x = draw(0, rows, tokens, 2)
    there = views.to_view(x, view.indices, view.inverse, view.buckets)
    back = views.from_view(there, view.owner, view.owned, view.buckets)
    real = np.asarray(view.owner) < view.owned.shape[1]
    assert 0 < real.sum() < real.size
    np.testing.assert_array_equal(back, np.where(real[..., None], x, 0))


def test_neither_direction_scatters(view):
    rows, _, tokens = view.inverse.shape

    def loss(x):
        there = views.to_view(x, view.indices, view.inverse, view.buckets)
        there = tuple(part**2 for part in there)
        return (views.from_view(there, view.owner, view.owned, view.buckets) ** 2).sum()

    def plain(x):
        return (plain_take(plain_take(x, view.indices) ** 2, view.owner) ** 2).sum()

    x = draw(0, rows, tokens, 2)
    compiled = [jax.jit(jax.grad(f)).lower(x).as_text() for f in (loss, plain)]
    assert ["scatter" in text for text in compiled] == [False, True]


def test_buckets_are_cut_and_joined_in_order(view):
    rows, entries = view.owned.shape
    tokens = view.owner.shape[1]
    x = jnp.arange(rows * tokens * 3).reshape(rows, tokens, 3)
    parts = views.to_view(x, view.indices, view.inverse, view.buckets)
    assert [part.shape for part in parts] == [
        (rows * count, length, 3) for count, length in view.buckets
    ]
    joined = views.join_buckets(parts, rows)
    assert joined.shape == (rows, entries, 3)
    for part, again in zip(parts, split(joined, view), strict=True):
        np.testing.assert_array_equal(part, again)
    # The lengths fall to the same sequences: a slot is filled where it is within the length.
    filled = split((view.indices < tokens)[..., None], view)
    for part, lengths in zip(filled, views.split_lengths(view), strict=True):
        np.testing.assert_array_equal(part[..., 0].sum(axis=1), lengths)
        np.testing.assert_array_equal(part[..., 0], np.arange(part.shape[1]) < lengths[:, None])
