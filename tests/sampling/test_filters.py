"""The filters against a sort of the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.sampling import filters
from tests.sampling.filtered import filter_logits


def keep_by_sorting(logits, temperature, top_k, top_p):
    """Return bool[S, V] of the tokens kept; ties with the last one stay."""
    kept = np.ones(logits.shape, bool)
    for row, values in enumerate(logits.astype(np.float64) / temperature):
        if top_k:
            least = np.sort(values)[::-1][min(top_k, len(values)) - 1]
            kept[row] &= values >= least
        if top_p < 1:
            weights = np.where(kept[row], np.exp(values - values.max()), 0)
            ranked = np.sort(weights)[::-1]
            enough = np.searchsorted(np.cumsum(ranked), top_p * weights.sum())
            kept[row] &= weights >= ranked[min(enough, len(ranked) - 1)]
    return kept


run = functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))(filter_logits)


def draw_logits(kind):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(40, 101)).astype(np.float32)
    if kind == "tied":  # few distinct values, the largest among them often
        return np.round(logits / 2).astype(np.float32)
    if kind == "peaked":
        logits[:, 7] += 40
    return logits


@pytest.mark.parametrize("kind", ["random", "tied", "peaked"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 1, 1.0),
        (1.0, 10, 1.0),
        (0.7, 0, 0.9),
        (1.0, 0, 0.5),
        (1.3, 0, 1e-6),
        (0.7, 20, 0.8),
        (2.0, 101, 0.95),
        (0.5, 5000, 1.0),
    ],
)
def test_the_kept_tokens_are_those_of_a_sort(kind, temperature, top_k, top_p):
    logits = draw_logits(kind)
    got = np.asarray(run(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    expected = keep_by_sorting(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), expected)
    scaled = (logits / np.float32(temperature))[expected]
    np.testing.assert_allclose(got[expected], scaled, rtol=1e-6)
    assert expected.any(axis=1).all()


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_several_bits_a_pass_find_the_same_cutoff(bits, monkeypatch):
    logits = draw_logits("tied")
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.8}
    expected = np.isfinite(filter_logits(logits, **options))
    monkeypatch.setattr(filters, "_choose_bits", lambda: bits)
    np.testing.assert_array_equal(np.isfinite(filter_logits(logits, **options)), expected)


def test_without_filters_only_the_temperature_acts():
    logits = draw_logits("random")
    got = run(logits, temperature=1.0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(got, logits)


def test_without_ties_top_k_keeps_exactly_k():
    logits = draw_logits("random")
    for k in (1, 2, 50, 100, 101):
        got = np.asarray(run(logits, temperature=0.9, top_k=k, top_p=1.0))
        assert (np.isfinite(got).sum(axis=1) == k).all()


def test_top_p_takes_its_share_of_what_top_k_left():
    # Of the two likeliest, 0.6 and 0.4 after top-k, the first alone reaches one half.
    logits = np.log(np.array([[0.3, 0.2, 0.25, 0.25 - 1e-3, 1e-3]], np.float32))
    got = run(logits, temperature=1.0, top_k=2, top_p=0.5)
    assert np.isfinite(got).tolist() == [[True, False, False, False, False]]
    got = run(logits, temperature=1.0, top_k=0, top_p=0.5)
    assert np.isfinite(got).tolist() == [[True, False, True, False, False]]


def test_tokens_ruled_out_before_stay_out():
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]])
    for options in ({"top_k": 3}, {"top_p": 0.999}, {"top_k": 3, "top_p": 0.999}):
        got = run(logits, temperature=1.0, **options)
        assert np.isfinite(got).tolist() == [[True, False, True, False]]


def test_only_ids_that_no_token_has_are_masked():
    logits = jnp.zeros((2, 61))
    assert filters.mask_unknown(logits, ()) is logits
    masked = filters.mask_unknown(logits, ((0, 1), (60, 61)))
    assert np.flatnonzero(np.isinf(masked[1])).tolist() == [0, 60]


def test_a_vocabulary_with_many_holes_costs_no_more_than_one_with_few():
    def count_operations(ranges):
        run = jax.jit(functools.partial(filters.mask_unknown, unknown=ranges))
        return run.lower(jnp.zeros((2, 4000))).as_text().count("stablehlo.")

    holes = tuple((start, start + 1) for start in range(1, 4000, 2))
    masked = filters.mask_unknown(jnp.zeros((2, 4000)), holes)
    assert np.flatnonzero(np.isinf(masked[0])).tolist() == list(range(1, 4000, 2))
    assert count_operations(holes) == count_operations(holes[:1])


@pytest.mark.parametrize("size, count", [(5, 9), (101, 64), (3000, 7), (5001, 4), (40_000, 64)])
def test_the_largest_logits_are_found_whole_in_falling_order(size, count):
    rng = np.random.default_rng(size)
    logits = rng.normal(size=(6, size)).astype(np.float32)
    logits[1] = np.sort(logits[1])  # all of the largest in one block, at the end
    logits[2] = np.sort(logits[2])[::-1]
    logits[3, size // 3 :] = -np.inf
    values, ids = jax.jit(filters.find_largest, static_argnums=1)(logits, count)
    expected = -np.sort(-logits, axis=1)[:, :count]
    np.testing.assert_array_equal(values, expected)
    ids = np.asarray(ids)
    assert all(len(set(row)) == len(row) == min(count, size) for row in ids[[0, 1, 2, 4, 5]])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, axis=1), expected)


def test_of_equal_logits_any_are_the_largest_but_each_once():
    logits = jnp.zeros((2, 5000)).at[1, 4000].set(1.0)
    values, ids = filters.find_largest(logits, 12)
    assert [len(set(row.tolist())) for row in ids] == [12, 12]
    assert ids[1, 0] == 4000 and values[1].tolist() == [1.0] + [0.0] * 11
