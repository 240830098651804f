"""Properties of plans and batches on random items: nothing lost, nothing twice, all found again."""

import collections
import functools

import jax
import numpy as np
import pytest

from halos_jax.packing.batches import (
    build_batch,
    count_steps,
    order_items,
    plan_batches,
    split_evenly,
    split_logps,
    split_scores,
)
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, PADDING, REJECTED, TARGET, Item

KINDS = {
    "pairs": (CHOSEN, REJECTED),
    "targets": (TARGET,),
    "with mismatched": (TARGET, MISMATCHED),
    "groups": (MEMBER,) * 4,
}
PLANS = {
    "one row": {"batch_size": 7, "num_rows": 1, "tokens_per_row": 4096, "row_multiple": 8},
    "four rows": {"batch_size": 7, "num_rows": 4, "tokens_per_row": 4096, "row_multiple": 16},
    "microbatches": {"batch_size": 12, "num_rows": 2, "tokens_per_row": 88, "row_multiple": 8},
    "more rows than items": {"batch_size": 3, "num_rows": 8, "tokens_per_row": 200},
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


@functools.cache
def make_case(kind, plan, seed=0):
    items = make_items(KINDS[kind], 23, seed)
    return items, plan_batches(items, seed=seed, epochs=2, **PLANS[plan])


cases = pytest.mark.parametrize(
    ("kind", "plan"),
    [(kind, plan) for kind in KINDS for plan in PLANS],
)


def rows_of(items, plan, step):
    """Yield (items, arrays) of every row of a step; arrays are those of the batch, by name."""
    batch = build_batch(items, plan, step)
    arrays = {
        name: getattr(batch, name)
        for name in ("tokens", "positions", "source", "target", "sequence", "reference_logps")
    }
    for part in (batch.view, batch.sequences):
        arrays |= {name: value for name, value in vars(part).items() if name != "buckets"}
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}
    for row, members in enumerate(plan.steps[step]):
        yield (
            [items[index] for index in members],
            {name: value[row] for name, value in flat.items()},
        )


@cases
def test_an_epoch_takes_every_item_once_in_steps_of_equal_size(kind, plan):
    items, planned = make_case(kind, plan)
    expected = {7: [8, 8, 7], 12: [12, 11], 3: [3] * 7 + [2]}[PLANS[plan]["batch_size"]]
    per_epoch = len(expected)
    assert len(planned) == 2 * per_epoch
    epochs = []
    for first in (0, per_epoch):
        steps = planned.steps[first : first + per_epoch]
        taken = [[index for row in step for index in row] for step in steps]
        assert [len(step) for step in taken] == expected
        assert sorted(index for step in taken for index in step) == list(range(len(items)))
        epochs.append([frozenset(step) for step in taken])
    assert epochs[0] != epochs[1], "both epochs have the same order"


@cases
def test_every_step_has_the_shapes_of_the_layout(kind, plan):
    items, planned = make_case(kind, plan)
    layout, lead = planned.layout, (planned.layout.microbatches, planned.layout.rows)
    assert layout.rows == PLANS[plan]["num_rows"]
    assert layout.microbatches > 1 or plan != "microbatches"
    expected = {
        "tokens": (layout.tokens,),
        "positions": (layout.tokens,),
        "source": (layout.positions,),
        "target": (layout.positions,),
        "sequence": (layout.positions,),
        "reference_logps": (layout.positions,),
    }
    view = {
        "indices": (layout.num_entries,),
        "inverse": (layout.copies, layout.tokens),
        "owner": (layout.tokens,),
        "owned": (layout.num_entries,),
        "lengths": (layout.num_sequences,),
    }
    types = None
    for step in range(len(planned)):
        batch = build_batch(items, planned, step)
        for holder, shapes in ((batch, expected), (batch.view, view)):
            for name, shape in shapes.items():
                assert getattr(holder, name).shape == (*lead, *shape), name
        for leaf in jax.tree.leaves(batch.sequences):
            assert leaf.shape == (*lead, layout.num_sequences)
        assert batch.num_tokens.shape == batch.num_examples.shape == lead[:1]
        assert batch.view.buckets == layout.buckets
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(batch)]
        assert types in (None, dtypes)
        assert set(map(str, dtypes)) <= {"int32", "float32", "bool"}
        types = dtypes


@cases
def test_rows_hold_whole_items_and_the_fill_is_that_of_the_rows(kind, plan):
    items, planned = make_case(kind, plan)
    real = total = 0
    for step in range(len(planned)):
        for members, row in rows_of(items, planned, step):
            flat = [np.concatenate([item.prompt_ids, *item.responses]) for item in members]
            expected = np.concatenate(flat) if flat else np.zeros(0)
            np.testing.assert_array_equal(row["tokens"][: len(expected)], expected)
            assert not row["tokens"][len(expected) :].any()
            real, total = real + len(expected), total + planned.layout.tokens
    assert planned.fill == pytest.approx(real / total)
    assert planned.layout.tokens <= PLANS[plan]["tokens_per_row"]


@cases
def test_the_view_is_one_to_one_and_shows_every_sequence_whole(kind, plan):
    items, planned = make_case(kind, plan)
    layout = planned.layout
    tokens, entries = layout.tokens, layout.num_entries
    starts, at = [], 0
    for count, length in layout.buckets:
        starts += [(at + number * length, length) for number in range(count)]
        at += count * length
    for step in range(len(planned)):
        for members, row in rows_of(items, planned, step):
            seen = collections.Counter()
            for number, (start, room) in enumerate(starts):
                length = row["lengths"][number]
                assert length <= room
                shown = row["indices"][start : start + room]
                assert (shown[length:] == tokens).all()
                seen[tuple(row["tokens"][shown[:length]])] += length > 0
                np.testing.assert_array_equal(row["positions"][shown[:length]], np.arange(length))
            expected = collections.Counter(
                tuple(np.concatenate([item.prompt_ids, response]))
                for item in members
                for response in item.responses
            )
            assert +seen == expected
            # `inverse` lists exactly the entries that point to a token, each once.
            pointing = collections.defaultdict(set)
            for entry, token in enumerate(row["indices"]):
                if token < tokens:
                    pointing[int(token)].add(entry)
            for token in range(tokens):
                found = [entry for entry in row["inverse"][:, token] if entry < entries]
                assert len(found) == len(set(found))
                assert set(found) == pointing[token]
            # `owner` and `owned` undo each other, and an owner shows its own token.
            real = sum(item.num_tokens for item in members)
            owned = row["owner"][:real]
            np.testing.assert_array_equal(row["owned"][owned], np.arange(real))
            np.testing.assert_array_equal(row["indices"][owned], np.arange(real))
            assert (row["owner"][real:] == entries).all()
            assert (row["owned"] < tokens).sum() == real


@cases
def test_each_response_token_is_predicted_from_the_token_before_it(kind, plan):
    items, planned = make_case(kind, plan)
    for step in range(len(planned)):
        for members, row in rows_of(items, planned, step):
            written, by_sequence = 0, collections.defaultdict(list)
            for group, item in enumerate(members):
                for copy, response in enumerate(item.responses):
                    part = slice(written, written + len(response))
                    written += len(response)
                    np.testing.assert_array_equal(row["target"][part], response)
                    before = np.concatenate([item.prompt_ids, response])[:-1]
                    before = before[len(item.prompt_ids) - 1 :]
                    np.testing.assert_array_equal(row["tokens"][row["source"][part]], before)
                    numbers = set(row["sequence"][part].tolist())
                    assert len(numbers) == (1 if len(response) else 0)
                    by_sequence[group] += [(copy, number) for number in numbers]
            assert (row["sequence"][written:] == planned.layout.num_sequences).all()
            found = [number for part in by_sequence.values() for _, number in part]
            assert len(found) == len(set(found))
            for group, part in by_sequence.items():
                for copy, number in part:
                    item = members[group]
                    assert row["group"][number] == group
                    assert row["role"][number] == item.roles[copy]
                    assert row["weight"][number] == item.weight
                    reward = item.rewards[copy] if item.rewards else 0.0
                    assert row["reward"][number] == np.float32(reward)
                    assert row["tokens"][row["last"][number]] == item.responses[copy][-1]


@cases
def test_partners_are_symmetric_and_of_one_item(kind, plan):
    items, planned = make_case(kind, plan)
    for step in range(len(planned)):
        for members, row in rows_of(items, planned, step):
            partner, role = row["partner"], row["role"]
            numbers = np.arange(len(partner))
            np.testing.assert_array_equal(partner[partner], numbers)
            paired = np.isin(role, (CHOSEN, REJECTED))
            assert (partner[~paired] == numbers[~paired]).all()
            assert (role[partner[role == CHOSEN]] == REJECTED).all()
            np.testing.assert_array_equal(row["group"][partner], row["group"])
            used = role != PADDING
            assert used.sum() == sum(len(item.responses) for item in members)
            assert not row["weight"][~used].any() and not row["lengths"][~used].any()


@cases
def test_totals_are_those_of_the_whole_step(kind, plan):
    items, planned = make_case(kind, plan)
    for step in range(len(planned)):
        members = [items[index] for row in planned.steps[step] for index in row]
        batch = build_batch(items, planned, step)
        assert (batch.num_examples == sum(item.weight for item in members)).all()
        tokens = sum(len(response) for item in members for response in item.responses)
        assert (batch.num_tokens == tokens).all()


@cases
def test_a_step_can_be_built_alone(kind, plan):
    items, planned = make_case(kind, plan)
    late = len(planned) - 2
    wanted = {index for row in planned.steps[late] for index in row}
    # Only the items of the step may be looked at.
    alone = [item if index in wanted else None for index, item in enumerate(items)]
    expected = [build_batch(items, planned, step) for step in range(len(planned))][late]
    got = build_batch(alone, planned, late)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@cases
def test_reference_logps_and_split_logps_are_inverse(kind, plan):
    items, planned = make_case(kind, plan)
    rng = np.random.default_rng(1)
    given = [
        tuple(rng.normal(size=len(response)).astype(np.float32) for response in item.responses)
        for item in items
    ]
    found = {}
    for step in range(len(planned)):
        batch = build_batch(items, planned, step, reference_logps=given)
        padding = batch.sequence == planned.layout.num_sequences
        assert not batch.reference_logps[padding].any()
        found.update(split_logps(planned, step, items, batch.reference_logps))
    assert sorted(found) == list(range(len(items)))
    for index, parts in found.items():
        assert len(parts) == len(given[index])
        for part, expected in zip(parts, given[index], strict=True):
            np.testing.assert_array_equal(part, expected)


@cases
def test_split_scores_finds_the_sequence_of_each_response(kind, plan):
    items, planned = make_case(kind, plan)
    found = {}
    for step in range(len(planned)):
        batch = build_batch(items, planned, step)
        # A score that tells its sequence: the token at the sequence's end.
        scores = np.take_along_axis(batch.tokens, batch.sequences.last, axis=-1)
        found.update(split_scores(planned, step, items, scores))
    for index, item in enumerate(items):
        ends = [np.concatenate([item.prompt_ids, response])[-1] for response in item.responses]
        assert found[index] == tuple(float(end) for end in ends)


def test_no_seed_keeps_the_order_and_a_seed_fixes_it():
    items = make_items(KINDS["targets"], 20, 0)
    options = {"batch_size": 4, "num_rows": 1, "tokens_per_row": 512, "row_multiple": 8}
    plain = plan_batches(items, **options)
    assert [sorted(i for row in step for i in row) for step in plain.steps] == [
        list(range(start, start + 4)) for start in range(0, 20, 4)
    ]
    assert plan_batches(items, seed=3, **options) == plan_batches(items, seed=3, **options)
    assert plan_batches(items, seed=3, **options) != plan_batches(items, seed=4, **options)
    longer = plan_batches(items, seed=3, epochs=3, **options)
    assert longer.steps[:5] == plan_batches(items, seed=3, **options).steps


def test_no_more_microbatches_than_the_items_need():
    items = [Item(np.ones(4, np.int32), (np.ones(12, np.int32),), (TARGET,))] * 8
    for tokens, expected in ((128, 1), (64, 2), (32, 4), (31, 8), (16, 8)):
        plan = plan_batches(items, batch_size=8, num_rows=1, tokens_per_row=tokens, row_multiple=1)
        assert plan.layout.microbatches == expected
        assert plan.fill == pytest.approx(1.0)


def test_rounding_does_not_lead_past_the_longest_row():
    items = [Item(np.ones(1, np.int32), (np.ones(1000, np.int32),), (TARGET,))]
    options = {"batch_size": 1, "num_rows": 1, "row_multiple": 8, "known": ()}
    assert plan_batches(items, tokens_per_row=1010, **options).layout.tokens == 1010
    assert plan_batches(items, tokens_per_row=1001, **options).layout.tokens == 1008
    assert plan_batches(items, tokens_per_row=9999, **options).layout.tokens == 1024


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no examples"),
        ([(3, (20,)), (9, (20, 40))], "item 1 has 69 tokens .* holds .*=64; raise it, or lower"),
        ([(3, (20,)), (0, (20,))], "item 1 has an empty prompt.*; give every prompt"),
        ([(3, ())], "item 0 has no response"),
    ],
)
def test_items_that_cannot_be_packed_are_one_clear_error(items, message):
    made = [
        Item(np.ones(prompt, int), tuple(np.ones(n, int) for n in sizes), (MEMBER,) * len(sizes))
        for prompt, sizes in items
    ]
    with pytest.raises(ValueError, match=message):
        plan_batches(made, batch_size=2, num_rows=1, tokens_per_row=64)


def test_with_a_seed_the_steps_are_equally_large_and_still_random():
    lengths = np.random.default_rng(0).lognormal(4, 1, 23 * 8).astype(int) + 1
    items = [Item(np.ones(1, np.int32), (np.ones(n, np.int32),), (TARGET,)) for n in lengths]
    options = {"batch_size": 8, "num_rows": 1, "tokens_per_row": 10**5, "epochs": 2}
    plans = [plan_batches(items, seed=seed, **options) for seed in (None, 0, 1)]
    sums = [[sum(lengths[list(row)].sum() for row in step) for step in p.steps] for p in plans]
    ordered, first, second = (max(one) / np.mean(one) for one in sums)
    assert max(first, second) < 1.25 < ordered
    company = [[frozenset(step[0]) for step in p.steps] for p in plans]
    assert not set(company[1]) & set(company[2])
    assert not set(company[1][:23]) & set(company[1][23:]), "both epochs have the same steps"
    assert plans[1] == plan_batches(items, seed=0, **options)


def test_who_shares_a_step_depends_on_the_seed_alone():
    items = make_items(KINDS["pairs"], 23, 0)
    plans = [
        plan_batches(items, batch_size=7, seed=3, epochs=2, num_rows=rows, tokens_per_row=tokens)
        for rows, tokens in [(1, 4096), (8, 4096), (2, 64)]
    ]
    first, *others = [
        [sorted(index for row in step for index in row) for step in plan.steps] for plan in plans
    ]
    assert all(other == first for other in others)


# Of 193 pairs none is a step by itself; a half rounds up.
EVEN = {(193, 32): [33] + [32] * 5, (208, 32): [30] * 5 + [29] * 2, (207, 32): [35] * 3 + [34] * 3}
EVEN |= {(47, 32): [47], (48, 32): [24, 24], (1, 32): [1], (5, 1): [1] * 5}


@pytest.mark.parametrize(("count", "size"), EVEN)
def test_no_step_is_a_leftover(count, size):
    assert split_evenly(count, size) == EVEN[count, size]
    assert count_steps(count, batch_size=size, epochs=3) == 3 * len(EVEN[count, size])
    items = make_items(KINDS["targets"], count, 0)
    for seed in (None, 1):
        plan = plan_batches(items, batch_size=size, seed=seed, num_rows=1, tokens_per_row=10**5)
        assert [sum(map(len, step)) for step in plan.steps] == EVEN[count, size]


@pytest.mark.parametrize(("most", "sizes"), [(0, [5, 5] * 2), (10, [5, 5]), (12, [5, 5, 2])])
def test_a_bound_of_items_ends_a_plan(most, sizes):
    items = make_items(KINDS["pairs"], 10, 0)
    options = {"batch_size": 6, "epochs": 2, "max_items": most}
    plan = plan_batches(items, num_rows=1, tokens_per_row=4096, seed=1, **options)
    taken = [[index for row in step for index in row] for step in plan.steps]
    assert [len(step) for step in taken] == sizes and count_steps(10, **options) == len(sizes)
    assert sorted(taken[0] + taken[1]) == list(range(10))
    second = {index for step in taken[2:] for index in step}
    assert second == set(order_items(10, seed=1, epoch=1)[: sum(sizes) - 10])
