"""Draws: which tokens, with which probabilities, and what is said of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from halos_jax.sampling import draws
from halos_jax.sampling.decode import derive_keys
from tests.sampling.exact_sets import list_kept
from tests.sampling.filtered import filter_logits

PLAIN = draws.DecodeSettings(
    temperature=1.0, top_k=0, top_p=1.0, max_tokens=9, chunk=4, stop_ids=(3, 5, 11)
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 6},
        {"temperature": 2.0, "top_p": 0.7},  # tested candidates
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.4},
        {"temperature": 2.0, "top_p": 0.4},  # a cutoff that is searched for
    ],
)
def test_tokens_are_drawn_with_their_filtered_probabilities(options):
    settings = dataclasses.replace(PLAIN, **options)
    count = 20_000
    row = 1.5 * np.random.default_rng(0).normal(size=12).astype(np.float32)
    logits = jnp.broadcast_to(row, (count, 12))
    keys = derive_keys(0, 1, [1] * count, range(count))
    drawn = jax.jit(functools.partial(draws.draw_tokens, settings=settings))(
        logits, keys, jnp.zeros(count, jnp.int32)
    )[0]
    filtered = filter_logits(
        logits[:1], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    expected = count * np.asarray(jax.nn.softmax(filtered[0]), np.float64)
    observed = np.bincount(np.asarray(drawn), minlength=12)
    assert not observed[expected == 0].any()
    kept = expected > 0
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    freedom = kept.sum() - 1
    # Mean `freedom`, variance 2 `freedom`: the keys are fixed, so this is no matter of luck.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_the_cumulative_sum_is_inverted_at_its_very_ends_and_between_blocks():
    rng = np.random.default_rng(0)
    weights = rng.random((64, 1300)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.7] = 0
    weights[:16, :700] = weights[16:32, 500:] = 0  # a first and a last block without any weight
    below_1 = np.float32(1 - 2**-24)
    uniforms = np.concatenate([np.zeros(8), np.full(8, below_1)] * 4).astype(np.float32)
    uniforms[40:] = rng.random(24)
    blocks = np.pad(weights, ((0, 0), (0, -1300 % 512))).reshape(64, -1, 512)
    drawn = draws.invert_cumulative(
        jnp.log(blocks),
        jnp.asarray(blocks.sum(axis=-1)),
        jnp.asarray(uniforms)[:, None],
        jnp.exp,
    )
    drawn = np.asarray(drawn)[:, 0]
    cumulative = np.cumsum(weights.astype(np.float64), axis=-1)
    exact = [np.searchsorted(row, u * row[-1], "right") for row, u in zip(cumulative, uniforms)]
    assert (weights[np.arange(64), drawn] > 0).all()
    at_drawn = cumulative[np.arange(64), drawn] / cumulative[:, -1]
    at_exact = cumulative[np.arange(64), np.minimum(exact, 1299)] / cumulative[:, -1]
    np.testing.assert_allclose(at_drawn, at_exact, atol=1e-5)  # float32 sums: a neighbour at most
    assert (drawn == exact).mean() > 0.9


def test_as_many_candidates_are_drawn_as_leave_nothing_to_chance_that_a_uniform_can_show():
    for top_p in (0.65, 0.8, 0.9, 0.95, 0.999):
        count = draws.count_candidates(top_p)
        assert (1 - top_p) ** count <= 2.0**-24 < (1 - top_p) ** (count - 1)
    assert draws.count_candidates(1.0) == 1
    assert draws.count_candidates(0.3) == 0, "too many would be needed: the cutoff is searched for"


@pytest.mark.parametrize("ties", [False, True])
def test_no_token_outside_of_top_p_is_drawn(ties):
    rng = np.random.default_rng(1)
    logits = 4 * rng.normal(size=(3000, 40)).astype(np.float32)
    logits = np.round(logits / 3) if ties else logits
    settings = dataclasses.replace(PLAIN, top_p=0.7)
    keys = derive_keys(0, 1, [1] * 3000, range(3000))
    drawn = draws.draw_tokens(jnp.asarray(logits), keys, jnp.zeros(3000, jnp.int32), settings)[0]
    kept = np.isfinite(filter_logits(jnp.asarray(logits), temperature=1.0, top_p=0.7))
    assert kept[np.arange(3000), np.asarray(drawn)].all() and not kept.all()


def test_a_token_is_not_drawn_where_the_likelier_ones_make_up_p_exactly():
    # Four weights that are 1 when rounded, of which the last is the least likely all the same.
    logits = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, -1e-8], jnp.float32), (2000, 4))
    keys = derive_keys(0, 1, [1] * 2000, range(2000))
    draw = jax.jit(draws.draw_tokens, static_argnames="settings")
    counts = {}
    for top_p in (0.75, float(np.nextafter(np.float32(0.75), np.float32(1)))):
        assert draws.count_candidates(top_p) > 1
        settings = dataclasses.replace(PLAIN, top_p=top_p)
        found = draw(logits, keys, jnp.zeros(2000, jnp.int32), settings=settings)[0]
        counts[top_p] = np.bincount(np.asarray(found), minlength=4)
    at, above = counts.values()
    assert at[3] == 0 and at[:3].min() > 500
    assert above.min() > 400


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 9},  # more than there are tokens
        {"temperature": 0.7, "top_k": 2},
        {"top_p": 0.7},
        {"top_p": 0.4},
        {"top_p": 0.95, "top_k": 4},
    ],
)
@pytest.mark.parametrize("excess", [0.0, 300.0])  # of the rows without a token: they rule it all
def test_ids_that_no_token_has_are_never_drawn(options, excess):
    count, known = 4000, np.array([0, 1, 4, 5, 6])
    row = np.random.default_rng(0).normal(size=12).astype(np.float32)
    logits = row + np.float32(excess) * ~np.isin(np.arange(12), known)
    settings = dataclasses.replace(PLAIN, **options)
    masked = dataclasses.replace(settings, unknown=((2, 4), (7, 12)))
    keys = derive_keys(0, 1, [1] * count, range(count))
    place = jnp.zeros(count, jnp.int32)
    draw = jax.jit(draws.draw_tokens, static_argnames="settings")

    def spread(logits):
        return jnp.broadcast_to(logits, (count, len(logits)))

    drawn, logps, _ = map(np.asarray, draw(spread(logits), keys, place, settings=masked))
    assert np.isin(drawn, known).all()
    # What is drawn is what a vocabulary of the known tokens alone would give.
    alone = draw(spread(row[known]), keys, place, settings=settings)[0]
    assert np.mean(known[np.asarray(alone)] != drawn) < 1e-3
    # The log-probabilities are those that the trainer has of the same tokens.
    expected = jax.nn.log_softmax(jnp.asarray(logits))[drawn]
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.8}])
def test_entropies_are_those_of_the_unfiltered_distribution_at_temperature_1(options):
    rng = np.random.default_rng(0)
    logits = (np.array([[0.1], [3.0], [40.0]]) * rng.normal(size=(3, 1300))).astype(np.float32)
    logits[2, 5] = -np.inf  # which has no share in it
    settings = dataclasses.replace(PLAIN, unknown=((7, 9),), **options)
    keys = derive_keys(0, 1, [1] * 3, range(3))
    drawn = draws.draw_tokens(jnp.asarray(logits), keys, jnp.zeros(3, jnp.int32), settings)
    exact = logits.astype(np.float64) - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    shares = np.exp(exact)
    expected = -np.sum(np.where(shares > 0, shares * np.where(shares > 0, exact, 0), 0), axis=-1)
    np.testing.assert_allclose(drawn[2], expected, rtol=1e-5)
    taken = np.asarray(drawn[0])
    np.testing.assert_allclose(drawn[1], exact[np.arange(3), taken], rtol=1e-5, atol=1e-5)


def test_positions_of_one_sample_are_drawn_independently():
    count = 20_000
    logits = jnp.zeros((count, 4))
    keys = jnp.broadcast_to(derive_keys(0, 1, [9], [2]), (count, 2))
    drawn = draws.draw_tokens(logits, keys, jnp.arange(count), PLAIN)[0]
    pairs = np.bincount(np.asarray(drawn[:-1]) * 4 + np.asarray(drawn[1:]), minlength=16)
    expected = (count - 1) / 16
    assert np.sum((pairs - expected) ** 2 / expected) < 15 + 4 * np.sqrt(30)


def test_temperature_zero_takes_the_argmax():
    logits = jax.random.normal(jax.random.key(0), (50, 61))
    settings = dataclasses.replace(PLAIN, temperature=0.0, top_k=3, top_p=0.5)
    keys = jnp.zeros((50, 2), jnp.uint32)
    drawn = draws.draw_tokens(logits, keys, jnp.arange(50), settings)[0]
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))
    assert drawn.dtype == jnp.int32


EXACT = [
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_p": 0.9, "max_kept": 64},
    {"temperature": 1.3, "top_p": 0.9, "max_kept": 3},  # more would make up 0.9
    {"temperature": 1.3, "top_k": 5, "max_kept": 5},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.6, "max_kept": 9},
    {"temperature": 1.0, "top_p": 0.9, "max_kept": 64},
    {"temperature": 1.3, "top_k": 40, "max_kept": 40},  # than there are tokens
    {"temperature": 1.3, "unknown": ((0, 2), (9, 12))},
    {"temperature": 1.3, "top_p": 0.9, "max_kept": 64, "unknown": ((0, 2), (9, 12))},
]
exactly = jax.jit(draws.draw_exactly, static_argnames="settings")


def expect_kept(row, settings):
    row = np.array(row, np.float64)
    for start, stop in settings.unknown:
        row[start:stop] = -np.inf
    return list_kept(
        row,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        most=settings.max_kept or 10**9,
    )


@pytest.mark.parametrize("options", EXACT)
def test_an_exact_draw_is_of_the_set_and_the_probability_that_it_says(options):
    settings = dataclasses.replace(PLAIN, is_exact=True, **options)
    logits = 2 * np.random.default_rng(1).normal(size=(300, 12)).astype(np.float32)
    keys = derive_keys(0, 1, [1] * 300, range(300))
    drawn = exactly(jnp.asarray(logits), keys, jnp.arange(300) % 7, settings=settings)
    for row, token, logp, kept in zip(
        logits,
        np.asarray(drawn.tokens),
        np.asarray(drawn.drawn_logps),
        [None] * 300 if drawn.kept is None else np.asarray(drawn.kept),
        strict=True,
    ):
        expected = expect_kept(row, settings)
        assert logp == pytest.approx(np.log(expected[token]), abs=2e-6)
        if kept is not None:
            assert sorted(kept[kept >= 0]) == sorted(expected)
    assert (drawn.kept is None) == (settings.max_kept == 0)
    plain = draws.draw_tokens(jnp.asarray(logits), keys, jnp.arange(300) % 7, settings)
    if drawn.kept is None:
        np.testing.assert_array_equal(drawn.tokens, plain[0])
    np.testing.assert_allclose(drawn.entropies, plain[2], rtol=1e-5, atol=1e-6)
    expected = jax.nn.log_softmax(jnp.asarray(logits))[jnp.arange(300), drawn.tokens]
    np.testing.assert_allclose(drawn.logps, expected, atol=2e-6)


@pytest.mark.parametrize("options", EXACT)
def test_exact_draws_have_the_probabilities_of_the_formula(options):
    settings = dataclasses.replace(PLAIN, is_exact=True, **options)
    count = 20_000
    row = 1.5 * np.random.default_rng(0).normal(size=12).astype(np.float32)
    keys = derive_keys(0, 1, [1] * count, range(count))
    logits = jnp.broadcast_to(row, (count, 12))
    drawn = exactly(logits, keys, jnp.zeros(count, jnp.int32), settings=settings)
    observed = np.bincount(np.asarray(drawn.tokens), minlength=12)
    expected = np.zeros(12)
    for token, share in expect_kept(row, settings).items():
        expected[token] = count * share
    assert not observed[expected == 0].any()
    kept = expected > 0
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_an_exact_draw_of_a_large_vocabulary_finds_its_set():
    settings = dataclasses.replace(PLAIN, is_exact=True, temperature=0.7, top_p=0.9, max_kept=16)
    logits = 3 * np.random.default_rng(1).normal(size=(8, 9000)).astype(np.float32)
    keys = derive_keys(0, 1, [1] * 8, range(8))
    drawn = exactly(jnp.asarray(logits), keys, jnp.zeros(8, jnp.int32), settings=settings)
    for row, kept in zip(logits, np.asarray(drawn.kept)):
        assert sorted(kept[kept >= 0]) == sorted(expect_kept(row, settings))
