"""Packed batches with known contents, for the tests of losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, get_loss
from halos_jax.packing.batches import Plan, build_batch, plan_batches, split_logps
from halos_jax.types import Batch, Item

Tokens = list[tuple[np.ndarray, ...]]  # for each item, one array a response


@dataclasses.dataclass(frozen=True)
class Packed:
    """Items, the one batch (without the microbatch axis) that holds them, and the ways between."""

    items: list[Item]
    plan: Plan
    batch: Batch

    def place(self, values: Tokens, padding: float = 0.0) -> np.ndarray:
        """Put token values where the batch has their tokens: f32[rows, P]."""
        placed = build_batch(self.items, self.plan, 0, reference_logps=values).reference_logps[0]
        return np.where(self.batch.is_response, placed, np.float32(padding))

    def split(self, array) -> Tokens:
        """Undo `place`."""
        return list(dict(sorted(split_logps(self.plan, 0, self.items, np.asarray(array)))).values())

    def place_by_role(self, values: dict[tuple[int, int], float]) -> np.ndarray:
        """Put the value of (item, role) at its sequence: f32[rows, sequences]."""
        role, group = self.batch.sequences.role, self.batch.sequences.group
        placed = np.full(role.shape, 1e3, np.float32)  # what no loss may read
        for row, members in enumerate(self.plan.steps[0]):
            for number, index in enumerate(members):
                for one in self.items[index].roles:
                    at = (role[row] == one) & (group[row] == number)
                    placed[row, at] = values[index, one]
        return placed


@pytest.fixture
def pack():
    """Return the function that packs items of drawn lengths into one batch; `.of` packs given."""

    def make(roles, count=7, *, seed=0, num_rows=2, weights=False) -> Packed:
        rng = np.random.default_rng(seed)
        draw = lambda: rng.integers(1, 50, rng.integers(1, 9)).astype(np.int32)  # noqa: E731
        items = [
            Item(
                draw(),
                tuple(draw() for _ in roles),
                roles,
                weight=float(rng.integers(1, 4)) if weights else 1.0,
            )
            for _ in range(count)
        ]
        return pack_items(items, num_rows)

    def pack_items(items, num_rows=2) -> Packed:
        plan = plan_batches(
            items, batch_size=len(items), num_rows=num_rows, tokens_per_row=512, row_multiple=8
        )
        assert plan.layout.microbatches == 1
        batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
        return Packed(items, plan, batch)

    make.of = pack_items
    return make


@pytest.fixture
def draw_logps():
    """Return the function that draws token log-probabilities for all responses of items."""

    def draw(packed: Packed, seed: int) -> Tokens:
        rng = np.random.default_rng(seed)
        return [
            tuple(-rng.exponential(2.0, len(response)) for response in item.responses)
            for item in packed.items
        ]

    return draw


@pytest.fixture
def differentiate():
    """Return central differences of a float64 function of token values, one value at a time."""

    def gradient(function, values: Tokens, step: float = 1e-5) -> Tokens:
        values = [tuple(np.array(part, np.float64) for part in parts) for parts in values]
        result = [tuple(np.zeros_like(part) for part in parts) for parts in values]
        for parts, slopes in zip(values, result, strict=True):
            for part, slope in zip(parts, slopes, strict=True):
                for index in range(len(part)):
                    kept = part[index]
                    ends = []
                    for sign in (1, -1):
                        part[index] = kept + sign * step
                        ends.append(function(values))
                    part[index] = kept
                    slope[index] = (ends[0] - ends[1]) / (2 * step)
        return result

    return gradient


@pytest.fixture
def compare(differentiate):
    """Return the check of a loss's value and gradient against a float64 function of the policy."""

    def check(packed: Packed, settings, tokens: dict[str, Tokens], formula, *, rtol=2e-5):
        others = {name: packed.place(value) for name, value in tokens.items() if name != "policy"}
        loss = get_loss(settings)

        def run(policy):
            inputs = LossInputs(policy=policy, **others)
            inputs = inputs.replace(statistics=loss.measure(inputs, packed.batch))
            return loss(inputs, packed.batch)

        placed = jnp.asarray(packed.place(tokens["policy"]))
        graded = jax.jit(jax.value_and_grad(run, has_aux=True))
        (value, metrics), gradient = graded(placed)
        np.testing.assert_allclose(value, formula(tokens["policy"]), rtol=rtol, atol=1e-7)
        slopes = packed.place(differentiate(formula, tokens["policy"]))
        scale = np.abs(slopes).max()
        np.testing.assert_allclose(gradient, slopes, rtol=rtol, atol=2e-6 * scale + 1e-9)
        return value, metrics, np.asarray(gradient)

    return check
