"""Token values of items: where they come from, and where they are put."""

import dataclasses

import numpy as np
import pytest

from halos_jax.config import ConfigError
from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.packing.token_values import Collected, list_token_values, refuse_unsampled
from halos_jax.types import MEMBER, Item


def make_items():
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(1, 50, rng.integers(1, 9)).astype(np.int32)  # noqa: E731
    return [Item(draw(), (draw(), draw()), (MEMBER,) * 2) for _ in range(6)]


def draw(items, seed):
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=len(r)).astype(np.float32) for r in x.responses) for x in items]


def collect(items, seed=7):
    return Collected(draw(items, 1), draw(items, 2), seed)


def test_old_log_probs_are_the_samplers_else_the_collectors_else_the_references():
    items = make_items()
    sampled = draw(items, 3)
    items[1] = Item(items[1].prompt_ids, items[1].responses, items[1].roles, old_logps=sampled[1])
    reference, old = draw(items, 4), collect(items)
    for collected, fallback in ((old, old.logps), (None, reference)):
        fields = list_token_values(items, (1, 0), 0, reference, collected)
        expected = np.concatenate([*sampled[1], *fallback[0]])
        np.testing.assert_array_equal(fields["old_logps"], expected)
        expected = np.concatenate([*reference[1], *reference[0]])
        np.testing.assert_array_equal(fields["reference_logps"], expected)
    fields = list_token_values(items, (0, 1), 0, None, None)
    assert fields.keys() == {"old_logps"}
    split = sum(map(len, items[0].responses))
    assert not fields["old_logps"][:split].any() and fields["old_logps"][split:].all()
    assert list_token_values(items, (), 0, None, None) == {}


def test_log_probs_of_the_start_stand_beside_the_samplers():
    items = [dataclasses.replace(item, old_logps=sampled) for item, sampled in sample_items()]
    start = draw(items, 5)
    plan = plan_batches(items, batch_size=6, num_rows=1, tokens_per_row=40, row_multiple=8)
    batch = build_batch(items, plan, 0, proximal_logps=start)
    for found, expected in (
        (batch.proximal_logps, start),
        (batch.old_logps, [item.old_logps for item in items]),
    ):
        for index, parts in split_logps(plan, 0, items, found):
            for one, other in zip(parts, expected[index], strict=True):
                np.testing.assert_array_equal(one, other)
    assert build_batch(items, plan, 0).proximal_logps is None


def sample_items():
    items = make_items()
    return zip(items, draw(items, 3), strict=True)


def test_items_of_unknown_samplers_are_refused_by_their_number():
    items = [dataclasses.replace(item, old_logps=sampled) for item, sampled in sample_items()]
    refuse_unsampled(items)
    with pytest.raises(
        ConfigError,
        match=r"loss\.correction: got a ratio to the policy that sampled, but 2 of 8 examples lack",
    ):
        refuse_unsampled([*items, *make_items()[:2]])


def build(items, tokens_per_row, old, step=0):
    plan = plan_batches(
        items, batch_size=3, num_rows=1, tokens_per_row=tokens_per_row, row_multiple=8
    )
    batch = build_batch(items, plan, step, old=old)
    return plan, batch


def test_values_and_noise_stand_at_their_tokens_whatever_the_packing():
    items = make_items()
    old = collect(items)
    found = []
    for tokens_per_row in (512, 40):
        plan, batch = build(items, tokens_per_row, old, step=1)
        found.append(dict(split_logps(plan, 1, items, batch.noise)))
        for index, values in split_logps(plan, 1, items, batch.old_values):
            for got, expected in zip(values, old.values[index], strict=True):
                np.testing.assert_array_equal(got, expected)
        assert batch.noise.dtype == np.uint32
    assert batch.tokens.shape[0] > 1, "one microbatch shows nothing"
    assert found[0].keys() == found[1].keys() == {3, 4, 5}
    for index in found[0]:
        for one, other in zip(found[0][index], found[1][index], strict=True):
            np.testing.assert_array_equal(one, other)


def test_noise_is_another_for_each_step_item_and_seed():
    items = make_items()
    drawn = [
        build(
            [items[0]] * 6, 512, Collected(draw([items[0]] * 6, 1), draw([items[0]] * 6, 2), s), t
        )
        for s in (7, 8)
        for t in (0, 1)
    ]
    noise = np.concatenate([batch.noise[batch.noise > 0] for _, batch in drawn])
    assert len(set(noise)) == len(noise) == 4 * 3 * sum(map(len, items[0].responses))


def test_noise_of_an_item_is_another_when_it_comes_again():
    items = make_items()[:3]
    plan = plan_batches(
        items, batch_size=3, num_rows=1, tokens_per_row=512, row_multiple=8, epochs=2
    )
    old = collect(items)
    first, second = (
        dict(split_logps(plan, step, items, build_batch(items, plan, step, old=old).noise))
        for step in (0, 1)
    )
    for index in range(3):
        for one, other in zip(first[index], second[index], strict=True):
            assert not (one == other).any()


def test_losses_without_a_value_head_have_no_arrays_of_it():
    _, batch = build(make_items(), 512, None)
    assert batch.old_values is None and batch.noise is None
