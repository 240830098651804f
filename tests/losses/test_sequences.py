"""Sums over sequences: against plain loops, blind to padding, without scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from halos_jax.losses.sequences import (
    average_metrics,
    compute_ratios,
    count_and_sum,
    count_and_sum_tokens,
    count_examples,
    count_tokens,
    mean_by_sequence,
    spread_to_tokens,
    sum_by_sequence,
    sum_over_group,
    take_partner,
    take_share,
    weighted_sum,
)
from halos_jax.types import CHOSEN, MEMBER, REJECTED, TARGET

PAIR = (CHOSEN, REJECTED)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_sum_by_sequence_adds_each_response_and_no_padding(pack, draw_logps, num_rows):
    packed = pack(PAIR, num_rows=num_rows)
    logps = draw_logps(packed, 0)
    expected = packed.place_by_role(
        {
            (index, role): part.sum()
            for index, parts in enumerate(logps)
            for role, part in zip(PAIR, parts, strict=True)
        }
    )
    real = packed.batch.sequences.role > 0
    for padding in (0.0, 1e6, np.inf):
        got = np.asarray(sum_by_sequence(packed.place(logps, padding), packed.batch))
        np.testing.assert_allclose(got[real], expected[real], rtol=1e-6)
        assert not got[~real].any()


def test_ratios_are_differences_and_zero_at_padding(pack, draw_logps):
    packed = pack(PAIR)
    policy, other = draw_logps(packed, 0), draw_logps(packed, 1)
    expected = packed.place(
        [tuple(p - r for p, r in zip(*parts, strict=True)) for parts in zip(policy, other)]
    )
    for padding in (0.0, np.inf, np.nan):
        placed = (jnp.asarray(packed.place(one, padding)) for one in (policy, other))
        got = np.asarray(compute_ratios(*placed, packed.batch))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_share_is_of_the_examples_or_tokens_of_the_whole_step(pack):
    batch = pack(PAIR).batch
    batch = batch.replace(num_examples=jnp.float32(8), num_tokens=jnp.float32(20))
    assert float(take_share(jnp.float32(6), batch, per="example")) == 0.75
    assert float(take_share(jnp.float32(6), batch, per="token")) == np.float32(0.3)
    empty = batch.replace(num_tokens=jnp.float32(0))
    assert float(take_share(jnp.float32(0), empty, per="token")) == 0.0


def test_the_gradient_of_a_sum_is_one_where_there_is_a_token(pack, draw_logps):
    packed = pack(PAIR)
    total = lambda values: sum_by_sequence(values, packed.batch).sum()  # noqa: E731
    gradient = jax.grad(total)(jnp.asarray(packed.place(draw_logps(packed, 0))))
    ones = [tuple(np.ones(len(part)) for part in item.responses) for item in packed.items]
    np.testing.assert_array_equal(gradient, packed.place(ones))
    assert "scatter" not in jax.jit(jax.grad(total)).lower(gradient).as_text()


def test_take_partner_swaps_the_halves_of_each_pair(pack):
    packed = pack(PAIR)
    own = {(index, role): 10.0 * index + role for index in range(7) for role in PAIR}
    other = {(index, role): own[index, PAIR[role == CHOSEN]] for index, role in own}
    real = packed.batch.sequences.role > 0
    got = np.asarray(take_partner(packed.place_by_role(own), packed.batch))
    np.testing.assert_array_equal(got[real], packed.place_by_role(other)[real])


def test_sums_over_a_role_use_weights_and_counts_do_not(pack):
    packed = pack(PAIR, weights=True)
    weights = [item.weight for item in packed.items]
    assert len(set(weights)) > 1
    values = {
        (index, role): 2.0**index * (role == CHOSEN) + 1 for index in range(7) for role in PAIR
    }
    placed = packed.place_by_role(values)
    for role in PAIR:
        mine = [values[index, role] for index in range(7)]
        assert weighted_sum(placed, packed.batch, role) == np.dot(mine, weights)
        total, count = count_and_sum(placed, packed.batch, role)
        assert (total, count) == (sum(mine), 7)
    assert weighted_sum(placed, packed.batch, TARGET) == 0
    assert count_and_sum(placed, packed.batch, TARGET) == (0, 0)


def test_metrics_have_no_gradient(pack):
    packed = pack(PAIR)
    values = jnp.ones(packed.batch.sequences.role.shape)
    gradient = jax.grad(lambda x: count_and_sum(x, packed.batch, CHOSEN)[0])(values)
    assert not np.asarray(gradient).any()


def test_means_divide_by_the_tokens_whatever_their_values(pack):
    packed = pack(PAIR)
    lengths = {
        (index, role): len(response)
        for index, item in enumerate(packed.items)
        for role, response in zip(PAIR, item.responses, strict=True)
    }
    real = packed.batch.sequences.role > 0
    expected = packed.place_by_role(lengths)
    np.testing.assert_array_equal(np.asarray(count_tokens(packed.batch))[real], expected[real])
    # One token of each response is 3, the others are 0: zeros count.
    first = [
        tuple(3.0 * (np.arange(len(part)) == 0) for part in item.responses) for item in packed.items
    ]
    means = np.asarray(mean_by_sequence(packed.place(first), packed.batch))
    np.testing.assert_allclose(means[real], 3 / expected[real], rtol=1e-6)
    assert not means[~real].any()
    for role, slot in ((CHOSEN, 0), (REJECTED, 1)):
        tokens = sum(len(item.responses[slot]) for item in packed.items)
        assert count_and_sum_tokens(packed.place(first), packed.batch, role) == (21, tokens)


def test_values_are_spread_over_the_tokens_of_their_sequence(pack):
    packed = pack(PAIR, num_rows=3)
    values = {(index, role): 10.0 * index + role for index in range(7) for role in PAIR}
    spread = spread_to_tokens(jnp.asarray(packed.place_by_role(values)), packed.batch)
    expected = [
        tuple(
            np.full(len(part), values[index, role])
            for role, part in zip(PAIR, item.responses, strict=True)
        )
        for index, item in enumerate(packed.items)
    ]
    np.testing.assert_array_equal(spread, packed.place(expected))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_sums_over_a_group_stay_inside_of_it(pack, num_rows):
    packed = pack((MEMBER,) * 3, num_rows=num_rows, weights=True)
    batch = packed.batch
    real = np.asarray(batch.sequences.role) > 0
    ones = np.asarray(sum_over_group(jnp.ones(real.shape), batch))
    np.testing.assert_array_equal(ones, np.where(real, 3, 0))
    values = np.arange(real.size, dtype=np.float32).reshape(real.shape)
    sums = np.asarray(sum_over_group(values, batch))
    for row, group in zip(*np.nonzero(real), strict=True):
        same = real[row] & (batch.sequences.group[row] == batch.sequences.group[row, group])
        assert sums[row, group] == values[row, same].sum()
    np.testing.assert_allclose(
        count_examples(batch), sum(item.weight for item in packed.items), rtol=1e-6
    )


@pytest.mark.parametrize("numbers", [np, jnp])
def test_metrics_are_averaged_and_a_margin_is_one_of_classes(numbers):
    sums = {"loss": (3.0, 4.0), "rewards/chosen": (6.0, 2.0), "rewards/rejected": (5.0, 5.0)}
    expected = {"loss": 0.75, "rewards/chosen": 3.0, "rewards/rejected": 1.0}
    assert average_metrics(sums, numbers) == {**expected, "rewards/margins": 2.0}
    # Pairs have margins of their own, which stand.
    own = average_metrics(sums | {"rewards/margins": (7.0, 7.0)}, numbers)
    assert own == {**expected, "rewards/margins": 1.0}
    none = average_metrics(sums | {"rewards/rejected": (0.0, 0.0)}, numbers)
    assert none["rewards/rejected"] == 0 and np.isnan(none["rewards/margins"])
    assert average_metrics({"loss": (0.0, 0.0)}, numbers) == {"loss": 0.0}


def test_values_of_tokens_and_of_sequences_are_not_mixed_up(pack):
    batch = pack(PAIR).batch
    by_token, by_sequence = jnp.ones(batch.sequence.shape), jnp.ones(batch.sequences.role.shape)
    assert by_token.shape != by_sequence.shape
    for function, given, other in (
        (sum_by_sequence, by_token, by_sequence),
        (mean_by_sequence, by_token, by_sequence),
        (spread_to_tokens, by_sequence, by_token),
        (take_partner, by_sequence, by_token),
    ):
        function(given, batch)
        with pytest.raises(TypeCheckError, match="parameter 'values'"):
            function(other, batch)


def test_squares_of_weights_become_their_effective_number():
    sums = {"correction/weight": (6.0, 4.0), "correction/squares": (12.0, 4.0)}
    for numbers in (np, jnp):
        means = average_metrics(sums, numbers)
        assert means == {"correction/weight": 1.5, "correction/effective": 0.75}
    none = {"correction/weight": (0.0, 0.0), "correction/squares": (0.0, 0.0)}
    assert average_metrics(none, np) == {"correction/weight": 0, "correction/effective": 0}
