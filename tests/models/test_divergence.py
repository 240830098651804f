"""The chunked divergence against its formula in float64, TRL's values, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses.terms import Divergence
from halos_jax.models.divergence import Comparison, compute_divergences

ROWS, POSITIONS, WIDTH, TEACHER_WIDTH = 4, 13, 16, 24
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]

# What TRL 1.16's GKDTrainer.generalized_jsd_loss gives in float64: (beta, temperature) -> (mean
# over the two positions, its gradient by the first position's policy logits).
POLICY = [[0.2, -1.0, 1.5, 0.0], [2.0, 0.1, -0.7, 0.4]]
TEACHER = [[1.0, 0.3, -0.2, 0.5], [-0.5, 0.8, 0.9, -1.2]]
TRL = {
    (0.0, 1.0): (0.9231372952105277, [-0.12159246042, -0.077256448796, 0.254271294855]),
    (0.0, 0.9): (1.1111565709460056, [-0.153755079372, -0.08789740355, 0.309865925081]),
    (0.1, 1.0): (0.0793731961041261, [-0.010709298678, -0.006229987298, 0.022126989637]),
    (0.1, 0.9): (0.09426575634896554, [-0.013355995126, -0.006867648432, 0.026565123285]),
    (0.5, 1.0): (0.2102590103202188, [-0.029009518733, -0.013645086607, 0.059254089888]),
    (0.5, 0.9): (0.24645091875517855, [-0.034960991069, -0.014264952353, 0.069002698375]),
    (0.9, 1.0): (0.0825465825511941, [-0.011621267145, -0.004755381526, 0.023878278529]),
    (0.9, 0.9): (0.09773662261381398, [-0.013884481759, -0.0049116584, 0.027669463862]),
    (1.0, 1.0): (0.9671543188429487, [-0.138270023858, -0.054652810824, 0.284915262378]),
    (1.0, 0.9): (1.156773144030961, [-0.166322237113, -0.056748050112, 0.332727772051]),
}


@pytest.mark.parametrize(("beta", "temperature"), TRL)
@pytest.mark.parametrize("keep", [False, True])
def test_values_and_gradients_are_those_of_trl(beta, temperature, keep):
    comparison = Comparison(Divergence(beta, temperature), words=4, chunk=1, keep=keep)
    words = jnp.eye(4)  # as the head: a state is the logits themselves
    teacher, targets = jnp.array([TEACHER]), jnp.zeros((1, 2), jnp.int32)

    def mean(logits):
        found = compute_divergences(logits, words, teacher, words, targets, comparison)
        return found.values.mean()

    value, gradient = jax.value_and_grad(mean)(jnp.array([POLICY]))
    expected, slopes = TRL[beta, temperature]
    assert value == pytest.approx(expected, rel=2e-6)
    np.testing.assert_allclose(gradient[0, 0, :3], slopes, atol=2e-7)
    assert gradient[0].sum(axis=-1) == pytest.approx([0, 0], abs=1e-6)


def make_inputs(vocab, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(ROWS, POSITIONS, WIDTH))
    teacher_hidden = scale * rng.normal(size=(ROWS, POSITIONS, TEACHER_WIDTH))
    heads = rng.normal(size=(vocab, WIDTH)), rng.normal(size=(vocab, TEACHER_WIDTH))
    targets = rng.integers(0, vocab - 3, (ROWS, POSITIONS))
    weights = rng.normal(size=(ROWS, POSITIONS))
    return hidden, heads[0], teacher_hidden, heads[1], targets, weights


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_values(hidden, head, teacher_hidden, teacher_head, targets, comparison):
    """Return divergences and the targets' log-probs by the definition, in float64."""

    def describe(hidden, head, softcap):
        logits = hidden @ head.T
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        return log_softmax(logits[..., : comparison.words] / comparison.divergence.temperature)

    s = describe(hidden, head, comparison.softcap)
    t = describe(teacher_hidden, teacher_head, comparison.teacher_softcap)
    kl = lambda p, q: (np.exp(p) * (p - q)).sum(axis=-1)  # noqa: E731
    beta = comparison.divergence.beta
    if beta in (0, 1):
        values = kl(t, s) if beta == 0 else kl(s, t)
    else:
        m = np.log((1 - beta) * np.exp(s) + beta * np.exp(t))
        values = beta * kl(t, m) + (1 - beta) * kl(s, m)
    return values, *(np.take_along_axis(x, targets[..., None], -1)[..., 0] for x in (s, t))


def expected_gradients(inputs, comparison):
    """Return the gradients of the weighted sum by hidden states and head: central differences."""
    hidden, head, *others, weights = inputs

    def total(hidden, head):
        return (expected_values(hidden, head, *others, comparison)[0] * weights).sum()

    rng = np.random.default_rng(5)
    directions = [(rng.normal(size=hidden.shape), rng.normal(size=head.shape)) for _ in range(4)]
    step = 1e-6
    slopes = [
        (total(hidden + step * a, head + step * b) - total(hidden - step * a, head - step * b))
        / (2 * step)
        for a, b in directions
    ]
    return directions, slopes


@functools.partial(jax.jit, static_argnames=("comparison",))
def ours(hidden, head, teacher_hidden, teacher_head, targets, weights, *, comparison):
    def total(*models):
        found = compute_divergences(*models, targets, comparison)
        return (found.values * weights).sum(), found

    models = (hidden, head, teacher_hidden, teacher_head)
    gradients, found = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*models)
    return found, gradients


def run(inputs, comparison, dtype=jnp.float32):
    *models, targets, weights = inputs
    models = [jnp.asarray(x, dtype) for x in models]
    return ours(
        *models, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), comparison=comparison
    )


def compare(inputs, comparison):
    found, gradients = run(inputs, comparison)
    expected = expected_values(*inputs[:-1], comparison)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6 * np.abs(other).max())
    directions, slopes = expected_gradients(inputs, comparison)
    for (along_hidden, along_head), slope in zip(directions, slopes, strict=True):
        got = (np.asarray(gradients[0], np.float64) * along_hidden).sum()
        got += (np.asarray(gradients[1], np.float64) * along_head).sum()
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-4)
    assert not any(np.any(gradient) for gradient in gradients[2:])  # the teacher learns nothing


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("keep", [False, True])
def test_padded_rows_of_the_heads_have_no_part(beta, keep):
    comparison = Comparison(Divergence(beta, 0.8), words=47, chunk=5, keep=keep)
    inputs = make_inputs(50)
    compare(inputs, comparison)
    loud = list(inputs)
    for number in (1, 3):
        loud[number] = inputs[number].copy()
        loud[number][47:] = 9.0
    one, other = run(inputs, comparison), run(loud, comparison)
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert not np.any(other[1][1][47:]) and np.any(other[1][1][46])


@pytest.mark.parametrize("chunk", [1, 13, 1000])
def test_any_chunk_gives_the_same(chunk):
    compare(make_inputs(50), Comparison(Divergence(0.3, 1.5), words=50, chunk=chunk))


@pytest.mark.parametrize("keep", [False, True])
def test_soft_caps_bend_logits_and_gradients(keep):
    divergence = Divergence(1.0, 0.7)
    compare(make_inputs(50), Comparison(divergence, 50, 5, 2.0, 3.0, keep))
    compare(make_inputs(50), Comparison(divergence, 50, 5, 2.0, 0.0, keep))


# 51 does not divide by the tensor axis; with 24 words the second shard of 48 is padding alone.
@pytest.mark.parametrize(("vocab", "words"), [(50, 47), (51, 48), (48, 24), (50, 50)])
@pytest.mark.parametrize("keep", [False, True])
def test_the_mesh_gives_the_same(mesh, vocab, words, keep):
    inputs = make_inputs(vocab)
    targets = np.minimum(inputs[4], words - 1)
    compare((*inputs[:4], targets, inputs[5]), Comparison(Divergence(0.5), words, 5, keep=keep))


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence_and_no_gradient(beta):
    hidden, head, _, _, targets, weights = make_inputs(50)
    found, gradients = run(
        (hidden, head, hidden, head, targets, weights), Comparison(Divergence(beta), 47, 5)
    )
    np.testing.assert_allclose(found.values, 0, atol=2e-7)
    np.testing.assert_array_equal(found.policy, found.teacher)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_models_that_agree_on_nothing_stay_finite(beta):
    found, gradients = run(make_inputs(50, scale=300.0), Comparison(Divergence(beta), 47, 5))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, gradients)))
    bound = {0.1: 0.1 * np.log(10) + 0.9 * np.log(1 / 0.9), 0.5: np.log(2)}.get(beta)
    if bound:  # the entropy of the mixture's weights
        assert found.values.max() == pytest.approx(bound, rel=1e-4)


def largest_with_vocab(function, *args, vocab):
    """Return the most elements of any value with an axis of the vocabulary, save the heads."""
    sizes = [0]

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape = tuple(getattr(variable.aval, "shape", ()))
                if vocab in shape and shape not in ((vocab, WIDTH), (vocab, TEACHER_WIDTH)):
                    sizes.append(int(np.prod(shape)))
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return max(sizes)


def test_no_logits_of_more_than_a_chunk_are_formed():
    inputs = map(jnp.asarray, make_inputs(997))
    both = functools.partial(ours, comparison=Comparison(Divergence(0.5), 997, chunk=4))
    assert largest_with_vocab(both, *inputs, vocab=997) == ROWS * 4 * 997
