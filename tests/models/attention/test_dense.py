"""Attention with scores in memory: block by block as over the whole, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.models.attention.dense import Scoring, attend_blocks, attend_dense

SINKS = np.array([-1.0, 0.5, 2.0, 4.0], np.float32)


def draw(length):
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (2, length, heads, 8))
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    ]


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize(("length", "window"), [(20, 5), (19, 4), (7, 1), (9, 4)])
def test_blocks_are_the_whole(length, window, sinks):
    *qkv, weights = draw(length)
    scoring = Scoring(window=window, sinks=sinks)
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & (distance < window)

    def run(attend):
        def total(qkv, scoring):
            out = attend(*qkv, scoring)
            return (out * weights).sum(), out

        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, out), gradients = run(qkv, scoring)
        return out, jax.tree.leaves(gradients)

    out, gradients = run(attend_blocks)
    expected, others = run(lambda q, k, v, scoring: attend_dense(q, k, v, visible, scoring))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert len(gradients) == 3 + (sinks is not None)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_sink_takes_its_share():
    q, k, v, _ = draw(5)
    visible = np.tri(5, dtype=bool)
    without = attend_dense(0 * q, k, v, visible, Scoring())
    found = attend_dense(0 * q, k, v, visible, Scoring(sinks=SINKS))
    seen = np.arange(1, 6)[:, None]
    share = seen / (seen + np.exp(SINKS))
    np.testing.assert_allclose(found, without * share[None, :, :, None], atol=1e-6)
    assert found.dtype == jnp.float32
