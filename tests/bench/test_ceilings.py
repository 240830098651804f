"""What a case costs, against counts made by hand, and that ceilings are rates."""

import dataclasses

import numpy as np

from halos_jax.bench.ceilings import (
    count_decode_bytes,
    count_forward_flops,
    measure_ceilings,
)
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import CHOSEN, REJECTED, Item

CONFIG = DecoderConfig(
    vocab_size=11,
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_mlp=6,
    compute_dtype="bfloat16",
)


def make_item(prompt, *responses):
    ids = [np.zeros(length, np.int32) for length in (prompt, *responses)]
    return Item(ids[0], tuple(ids[1:]), (CHOSEN, REJECTED)[: len(responses)])


def test_flops_of_a_forward_pass():
    # Per layer and token: q 8x8, k and v 8x4 each, o 8x8, three 8x6 matrices; norms are 2 x 8.
    matrices = 2 * (64 + 32 + 32 + 64 + 3 * 48 + 16)
    one = count_forward_flops([make_item(3, 5)], CONFIG)
    pairs = 9 / 2 + 5 * (3 + 5 / 2)
    attention = 2 * 2 * 2 * 8 * pairs  # scores and values, a product and a sum each, two layers
    assert one == 2 * matrices * 8 + 2 * 11 * 8 * 5 + attention
    # A prompt that two responses share is run once.
    shared = count_forward_flops([make_item(3, 5, 5)], CONFIG)
    assert 2 * one - shared == 2 * matrices * 3 + 2 * 2 * 2 * 8 * 9 / 2


def test_a_classifier_has_no_vocabulary():
    scores = dataclasses.replace(CONFIG, num_labels=1)
    item = make_item(3, 5)
    assert count_forward_flops([item], CONFIG) - count_forward_flops([item], scores) == (
        2 * 11 * 8 * 5 - 2 * 8
    )


def test_bytes_of_a_decode_step():
    weights = 2 * (64 + 32 + 32 + 64 + 3 * 48 + 16) + 8 + 11 * 8  # the table is only looked up
    cache = 4 * 10 * 2 * 2 * 4  # slots, tokens, layers, keys and values, head
    assert count_decode_bytes(CONFIG, slots=4, mean_length=10) == 2 * (weights + cache)


def test_ceilings_are_positive_rates():
    ceilings = measure_ceilings(tiny=True)
    assert 1e6 < ceilings.flops < 1e16 and 1e6 < ceilings.bytes < 1e14
