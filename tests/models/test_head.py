"""The chunked head against log_softmax in float64, on one device and on the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.head import compute_token_logps, compute_token_statistics

ROWS, POSITIONS, WIDTH = 4, 13, 16


def make_inputs(vocab, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(ROWS, POSITIONS, WIDTH))
    head = rng.normal(size=(vocab, WIDTH))
    targets = rng.integers(0, vocab, (ROWS, POSITIONS))
    weights = rng.normal(size=(ROWS, POSITIONS))
    return hidden, head, targets, weights


def expected_all(hidden, head, targets, weights, softcap=0.0):
    """Return log-probs and the gradients of their weighted sum, in float64 throughout."""
    logits, inner = hidden @ head.T, 1.0
    if softcap:
        bent = np.tanh(logits / softcap)
        logits, inner = softcap * bent, 1 - bent**2
    logits -= logits.max(axis=-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    slopes = (np.eye(len(head))[targets] - np.exp(logps)) * weights[..., None] * inner
    picked = np.take_along_axis(logps, targets[..., None], -1)[..., 0]
    return picked, slopes @ head, np.einsum("rpv,rpd->vd", slopes, hidden)


@functools.partial(jax.jit, static_argnames=("chunk", "softcap", "keep"))
def ours(hidden, head, targets, weights, *, chunk, softcap=0.0, keep=False):
    def total(hidden, head):
        logps = compute_token_logps(hidden, head, targets, chunk=chunk, softcap=softcap, keep=keep)
        return (logps * weights).sum(), logps

    gradients, logps = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    return logps, *gradients


def compare(inputs, *, chunk, dtype=jnp.float32, tolerance=2e-6, softcap=0.0, keep=False):
    hidden, head, targets, weights = inputs
    hidden, head = jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    got = ours(hidden, head, targets, weights, chunk=chunk, softcap=softcap, keep=keep)
    exact = (np.asarray(x, np.float64) for x in (hidden, head))
    assert [x.dtype for x in got] == [jnp.float32, dtype, dtype]
    expected = expected_all(*exact, inputs[2], inputs[3], softcap)
    for one, other in zip(got, expected, strict=True):
        one = np.asarray(one, np.float64)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_any_chunk_equals_log_softmax(chunk):
    compare(make_inputs(50), chunk=chunk)


def test_a_soft_cap_bends_logits_and_gradients(mesh):
    compare(make_inputs(50), chunk=5, softcap=2.0)


# 51 does not divide by the tensor axis, so every device holds the whole vocabulary.
@pytest.mark.parametrize("vocab", [50, 51])
def test_the_mesh_equals_log_softmax(mesh, vocab):
    compare(make_inputs(vocab), chunk=5)


def test_rows_that_the_mesh_cannot_share_are_replicated(mesh):
    hidden, head, targets, weights = make_inputs(50)
    compare((hidden[:3], head, targets[:3], weights[:3]), chunk=5)


def test_bfloat16_inputs_get_float32_statistics():
    compare(make_inputs(50), chunk=5, dtype=jnp.bfloat16, tolerance=1e-2)
    # The log-probs alone are exact but for the rounding of the inputs.
    hidden, head, targets, weights = make_inputs(50)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    got = compute_token_logps(hidden, head, jnp.asarray(targets), chunk=5)
    wide = (np.asarray(x, np.float64) for x in (hidden, head))
    np.testing.assert_allclose(got, expected_all(*wide, targets, weights)[0], atol=2e-5)


def test_large_logits_do_not_overflow():
    # Logits of some thousands have an absolute error of 1e-4 in float32.
    compare(make_inputs(50, scale=300.0), chunk=5, tolerance=3e-4)


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_kept_slopes_give_the_same_gradients(chunk, softcap):
    compare(make_inputs(50), chunk=chunk, softcap=softcap, keep=True)
    compare(
        make_inputs(50), chunk=chunk, softcap=softcap, keep=True, dtype=jnp.bfloat16, tolerance=1e-2
    )


def test_kept_slopes_on_the_mesh(mesh):
    for vocab in (50, 51):
        compare(make_inputs(vocab), chunk=5, keep=True)
    hidden, head, targets, weights = make_inputs(50)
    compare((hidden[:3], head, targets[:3], weights[:3]), chunk=5, keep=True)


def largest_with_vocab(function, *args, vocab):
    """Return the most elements that any value with an axis of the vocabulary has, save the head."""
    sizes = [0]

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape = getattr(variable.aval, "shape", ())
                if vocab in shape and tuple(shape) != (vocab, WIDTH):
                    sizes.append(int(np.prod(shape)))
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return max(sizes)


def test_no_logits_of_more_than_a_chunk_are_formed():
    hidden, head, targets, weights = map(jnp.asarray, make_inputs(997))
    run = functools.partial(ours, chunk=4)
    # 13 positions in chunks of at most 4 are four chunks of 4.
    assert largest_with_vocab(run, hidden, head, targets, weights, vocab=997) == ROWS * 4 * 997
    whole = functools.partial(ours, chunk=POSITIONS)
    found = largest_with_vocab(whole, hidden, head, targets, weights, vocab=997)
    assert found == ROWS * POSITIONS * 997


@pytest.mark.parametrize("statistic", ["entropy", "alignment"])
@pytest.mark.parametrize("vocab", [50, 51])
def test_statistics_stand_beside_unchanged_log_probs_and_gradients(mesh, vocab, statistic):
    hidden, head, targets, weights = map(jnp.asarray, make_inputs(vocab, scale=3.0))
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)

    def total(hidden, head, run):
        out = run(hidden, head, targets, chunk=5)
        logps = out[0] if isinstance(out, tuple) else out
        return (logps * weights).sum(), out

    graded = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    both = functools.partial(compute_token_statistics, statistic=statistic)
    gradients, (logps, found) = graded(hidden, head, both)
    expected_gradients, expected = graded(hidden, head, compute_token_logps)
    for one, other in zip((logps, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits -= logits.max(axis=-1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    wanted = {
        "entropy": -(shares * np.log(shares)).sum(axis=-1),
        "alignment": np.log((shares**2).sum(axis=-1)),
    }
    np.testing.assert_allclose(found, wanted[statistic], rtol=1e-4, atol=1e-5)
