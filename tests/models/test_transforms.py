"""The head's softmax at a temperature and over kept tokens, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.head import compute_token_logps, compute_token_statistics
from halos_jax.types import Transform

ROWS, POSITIONS, WIDTH, MOST = 4, 13, 16, 8
UNKNOWN = ((3, 5), (40, 51))


def make_inputs(vocab, seed=0):
    rng = np.random.default_rng(seed)
    hidden = 2 * rng.normal(size=(ROWS, POSITIONS, WIDTH))
    head = rng.normal(size=(vocab, WIDTH))
    weights = rng.normal(size=(ROWS, POSITIONS))
    heats = rng.choice([0.3, 0.7, 1.0, 1.6], (ROWS, POSITIONS)).astype(np.float32)
    targets = np.zeros((ROWS, POSITIONS), np.int32)
    kept = np.full((ROWS, POSITIONS, MOST), -1, np.int32)
    for place in np.ndindex(targets.shape):
        ids = np.sort(rng.permutation(vocab)[: rng.integers(1, MOST + 1)])
        kept[place][: len(ids)] = ids
        targets[place] = rng.choice(ids)
    return hidden, head, targets, weights, heats, kept


def expect(inputs, *, sets, unknown=(), softcap=0.0):
    """Return log-probs, entropies and the gradients of the log-probs' weighted sum, in float64."""
    hidden, head, targets, weights, heats, kept = inputs
    logits, inner = hidden @ head.T, 1.0
    if softcap:
        bent = np.tanh(logits / softcap)
        logits, inner = softcap * bent, 1 - bent**2
    allowed = np.ones(logits.shape, bool)
    if sets:
        allowed = (np.arange(len(head)) == kept[..., None]).any(axis=-2)
    else:
        for start, stop in unknown:
            allowed[..., start:stop] = False
    logits = np.where(allowed, logits / heats[..., None].astype(np.float64), -np.inf)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    shares = np.exp(logps)
    entropies = -np.sum(shares * np.where(allowed, logps, 0), axis=-1)
    slopes = (np.eye(len(head))[targets] - shares) * (weights / heats)[..., None] * inner
    picked = np.take_along_axis(logps, targets[..., None], -1)[..., 0]
    return picked, entropies, slopes @ head, np.einsum("rpv,rpd->vd", slopes, hidden)


@functools.partial(jax.jit, static_argnames=("chunk", "softcap", "keep", "unknown"))
def ours(hidden, head, targets, weights, transform, **options):
    def total(hidden, head):
        found = compute_token_statistics(hidden, head, targets, transform=transform, **options)
        return (found[0] * weights).sum(), found

    gradients, found = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    plain = compute_token_logps(hidden, head, targets, transform=transform, **options)
    return *found, *gradients, plain


def compare(vocab=64, *, sets, rows=ROWS, dtype=jnp.float32, tolerance=3e-6, **options):
    hidden, head, targets, weights, heats, kept = make_inputs(vocab)
    unknown = options.get("unknown", ())
    if not sets:
        known = [n for n in range(vocab) if not any(a <= n < b for a, b in unknown)]
        targets = np.random.default_rng(1).choice(known, targets.shape)
    parts = (hidden[:rows], head, targets[:rows], weights[:rows], heats[:rows], kept[:rows])
    hidden, head = jnp.asarray(parts[0], dtype), jnp.asarray(head, dtype)
    exact = [np.asarray(x, np.float64) for x in (hidden, head)]
    softcap = options.get("softcap", 0.0)
    expected = expect((*exact, *parts[2:]), sets=sets, unknown=unknown, softcap=softcap)
    transform = Transform(jnp.asarray(parts[4]), jnp.asarray(parts[5]) if sets else None)
    targets, weights = jnp.asarray(parts[2]), jnp.asarray(parts[3], jnp.float32)
    got = ours(hidden, head, targets, weights, transform, **{"chunk": 5} | options)
    for one, other in zip(got, (*expected, expected[0]), strict=True):
        one = np.asarray(one, np.float64)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
@pytest.mark.parametrize("keep", [False, True])
def test_the_softmax_is_over_the_kept_tokens_at_the_temperature(chunk, keep):
    compare(sets=True, chunk=chunk, keep=keep)


@pytest.mark.parametrize("keep", [False, True])
def test_without_sets_it_is_over_all_tokens_that_there_are(keep):
    compare(sets=False, keep=keep)
    compare(sets=False, keep=keep, unknown=UNKNOWN)


@pytest.mark.parametrize("sets", [False, True])
def test_the_soft_cap_comes_before_the_temperature(sets):
    compare(sets=sets, softcap=2.0)
    compare(sets=sets, softcap=2.0, keep=True)


# 51 does not divide by the tensor axis, so every device holds the whole vocabulary.
@pytest.mark.parametrize("vocab", [64, 51])
@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_mesh_equals_one_device(mesh, vocab, sets, keep):
    compare(vocab, sets=sets, keep=keep, unknown=UNKNOWN)


def test_rows_that_the_mesh_cannot_share_are_replicated(mesh):
    compare(sets=True, rows=3)


@pytest.mark.parametrize("keep", [False, True])
def test_bfloat16_inputs_get_float32_statistics(keep):
    compare(sets=True, dtype=jnp.bfloat16, tolerance=1e-2, keep=keep)


def test_a_token_that_is_not_kept_counts_for_nothing_however_likely():
    hidden, head = jnp.full((1, 1, 1), 100.0), jnp.arange(5.0)[:, None]
    transform = Transform(jnp.ones((1, 1)), jnp.array([[[0, 1, -1]]], jnp.int32))

    def run(hidden, keep):
        target = jnp.ones((1, 1), jnp.int32)
        return compute_token_logps(
            hidden, head, target, chunk=1, keep=keep, transform=transform
        ).sum()

    for keep in (False, True):
        value, gradient = jax.value_and_grad(run)(hidden, keep)
        assert abs(value) < 1e-6 and abs(gradient.sum()) < 1e-6


def test_padding_is_finite_and_has_no_gradient():
    hidden, head, *_ = make_inputs(64)
    hidden, head = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    zeros = jnp.zeros((ROWS, POSITIONS), jnp.int32)
    transform = Transform(jnp.ones(zeros.shape), jnp.full((*zeros.shape, MOST), -1, jnp.int32))

    def total(hidden, head):
        logps, entropies = compute_token_statistics(
            hidden, head, zeros, chunk=5, transform=transform
        )
        return jnp.where(zeros > 0, logps, 0.0).sum(), (logps, entropies)

    gradients, found = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    assert all(np.isfinite(x).all() for x in found)
    assert not any(np.asarray(x).any() for x in gradients)
