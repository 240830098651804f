"""What stands in a row: the targets of each response, and what is known of them."""

import dataclasses
import typing

import numpy as np
import pytest

from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.types import MEMBER, PADDING, Item

ROLES = (MEMBER,) * 4
PLANS = {
    "one row": {"batch_size": 7, "num_rows": 1, "tokens_per_row": 4096, "row_multiple": 8},
    "microbatches": {"batch_size": 20, "num_rows": 2, "tokens_per_row": 128, "row_multiple": 8},
}


def make_items(roles, count, seed):
    """Draw items whose every token is another number, so that a token tells where it is from."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(1, 10**6))

    def draw(low, high):
        size = rng.integers(low, high)
        return np.fromiter((next(fresh) for _ in range(size)), np.int32, size)

    return [
        Item(
            draw(1, 12),
            # A response may be empty: a conversation can fill its whole length.
            tuple(draw(0 if len(roles) > 1 else 1, 20) for _ in roles),
            roles,
            tuple(rng.normal(size=len(roles))) if rng.random() < 0.8 else (),
            float(rng.integers(1, 4)),
        )
        for _ in range(count)
    ]


def test_labels_and_the_samplers_logps_stand_at_their_items():
    items = make_items(ROLES, 6, 0)
    drawn = [tuple(np.float32(r) for r in item.responses) for item in items]  # all different
    items = [
        Item(i.prompt_ids, i.responses, i.roles, desirable=n < 2, old_logps=drawn[n] * (n % 2))
        for n, i in enumerate(items)
    ]
    plan = plan_batches(items, batch_size=6, num_rows=2, tokens_per_row=4096)
    reference = [tuple(-part for part in parts) for parts in drawn]
    batch = build_batch(items, plan, 0, reference_logps=reference)
    for index, parts in split_logps(plan, 0, items, batch.old_logps):
        # Where nothing is known of who sampled, the reference stands in.
        expected = drawn[index] if index % 2 else reference[index]
        assert all((one == other).all() for one, other in zip(parts, expected, strict=True))
    assert batch.sequences.desirable.sum() == 2 * 4


def mask_items(items, seed):
    """Give items masks, of which some leave a response without any target."""
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            item,
            masks=tuple(rng.random(len(part)) < rng.choice([0, 0.5]) for part in item.responses),
            old_logps=tuple(np.float32(part) for part in item.responses),
        )
        for item in items
    ]


def flatten(array):
    return array.reshape(-1, array.shape[-1])


@pytest.mark.parametrize("plan", PLANS)
def test_only_masked_in_tokens_are_targets(plan):
    items = mask_items(make_items(ROLES, 23, 0), 1)
    planned = plan_batches(items, seed=0, **PLANS[plan])
    for step in range(len(planned)):
        batch = build_batch(items, planned, step)
        found = {
            int(target): int(row[source])
            for row, targets, sources, numbers in zip(
                *(flatten(x) for x in (batch.tokens, batch.target, batch.source, batch.sequence)),
                strict=True,
            )
            for target, source, number in zip(targets, sources, numbers, strict=True)
            if number < planned.layout.num_sequences
        }
        expected = {}
        members = [items[index] for row in planned.steps[step] for index in row]
        for item in members:
            for response, mask in zip(item.responses, item.masks, strict=True):
                before = np.concatenate([item.prompt_ids[-1:], response])
                expected |= {
                    int(target): int(source)
                    for target, source, taken in zip(response, before, mask, strict=False)
                    if taken
                }
        assert found == expected
        assert (batch.num_tokens == len(expected)).all()
        # Without any target a sequence has no weight; with targets it has its item's.
        sequences = [one for item in members for one in zip(item.masks, [item.weight] * 4)]
        total = sum(weight * bool(mask.any()) for mask, weight in sequences)
        assert batch.sequences.weight.sum() == total
        assert (batch.sequences.role != PADDING).sum() == len(sequences)
        # What is known of targets goes to them and comes back.
        for index, parts in split_logps(planned, step, items, batch.old_logps):
            for part, response, mask in zip(parts, items[index].responses, items[index].masks):
                np.testing.assert_array_equal(part, response[mask])


def test_a_step_is_built_without_looking_at_others():
    class Watched(list):
        seen: typing.ClassVar[set] = set()

        def __getitem__(self, index):
            self.seen.add(index)
            return super().__getitem__(index)

    items = Watched(make_items(ROLES, 40, 0))
    plan = plan_batches(items, batch_size=4, num_rows=2, tokens_per_row=4096, seed=0)
    Watched.seen.clear()
    build_batch(items, plan, 7)
    assert Watched.seen == {index for row in plan.steps[7] for index in row}
