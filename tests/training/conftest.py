"""A tiny model and varied batches, for the tests of the optimizer step and its parts."""

import jax
import numpy as np
import pytest

from halos_jax.models.spec import DecoderConfig, init_params
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.packing.token_values import Collected
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item

TINY = DecoderConfig(
    vocab_size=97,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    init_std=0.2,
    head_chunk=7,
)
COUNT = 8
SHAPES = {
    "kto": (TARGET, MISMATCHED),
    "grpo": (MEMBER,) * 4,
    "ipo": (CHOSEN, REJECTED),
    "ppo": (MEMBER,) * 2,
}


@pytest.fixture
def tiny():
    """Return the config of a tiny model."""
    return TINY


@pytest.fixture
def params():
    """Return its params, on the host."""
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), TINY))


@pytest.fixture
def one(mesh1):
    with jax.set_mesh(mesh1):
        yield mesh1


@pytest.fixture
def make_varied():
    """Return the function that returns for a loss's name the function that packs a batch."""
    return _vary


def _vary(name):
    """Return a batch maker whose items have labels and scores, and reference log-probs."""
    rng, shape = np.random.default_rng(2), SHAPES[name]
    draw = lambda: rng.integers(1, 97, rng.integers(2, 8)).astype(np.int32)  # noqa: E731
    items = [
        Item(
            draw(),
            tuple(draw() for _ in shape),
            shape,
            rewards=tuple(map(float, rng.normal(size=len(shape)))),
            desirable=bool(index % 3),
        )
        for index in range(COUNT)
    ]
    reference = [
        tuple(-rng.exponential(9.0, len(r)).astype(np.float32) for r in item.responses)
        for item in items
    ]
    values = [tuple(rng.normal(size=len(r)).astype(np.float32) for r in x.responses) for x in items]
    old = Collected(reference, values, seed=5) if name == "ppo" else None

    def build(num_rows, microbatches):
        for tokens in range(sum(item.num_tokens for item in items), 0, -1):
            plan = plan_batches(
                items, batch_size=COUNT, num_rows=num_rows, tokens_per_row=tokens, row_multiple=8
            )
            if plan.layout.microbatches == microbatches:
                return build_batch(items, plan, 0, reference_logps=reference, old=old)

    return build
