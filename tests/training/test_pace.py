"""How fast steps are, and what they cost, against counts made by hand."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest

from halos_jax.models.spec import DecoderConfig, ExpertsConfig
from halos_jax.training import pace
from halos_jax.training.pace import StepClock, count_forward_flops, count_step_flops
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


def test_an_expert_that_a_token_skips_costs_nothing():
    """Of 4 experts a token goes to 2; the router is there for all."""
    experts = ExpertsConfig(num_experts=4, per_token=2, d_mlp=6)
    mixed = dataclasses.replace(CONFIG, experts=experts)
    item = make_item(3, 5)
    more = count_forward_flops([item], mixed) - count_forward_flops([item], CONFIG)
    # In place of one MLP: two of the same size, and the router, in each of two layers.
    assert more == 2 * 8 * 2 * (3 * 48 + 8 * 4)


def test_a_step_is_a_forward_and_a_backward_pass():
    items = [make_item(3, 5), make_item(2, 1, 1)]
    forward = count_forward_flops(items, CONFIG)
    assert count_step_flops(items, CONFIG, adapter=False) == 3 * forward
    assert count_step_flops(items, CONFIG, adapter=True) == 2 * forward


def test_the_clock_times_a_step_by_the_writes_around_its_result():
    clock = StepClock()
    clock.tick(8)  # step 1 is dispatched
    assert clock.rate == {}
    clock.tick(4)  # step 2 dispatched, so step 1 done: the time from here is that of step 2
    assert clock.rate == {}
    time.sleep(0.05)
    clock.tick(4)
    assert 0 < clock.rate["examples_per_second"] <= 4 / 0.05


@pytest.mark.parametrize(
    ("kinds", "dtype", "mfu"),
    [
        (("NVIDIA H100 80GB HBM3",) * 2, "bfloat16", 1e12 / 989.4e12),
        (("NVIDIA H100 80GB HBM3",) * 2, "float32", None),  # the peak is that of 16-bit matmuls
        (("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "bfloat16", None),
        (("cpu", "cpu"), "bfloat16", None),  # not known: not guessed
    ],
)
def test_rates_are_of_what_the_devices_can_do(monkeypatch, kinds, dtype, mfu):
    devices = np.array([SimpleNamespace(device_kind=kind) for kind in kinds])
    clock = StepClock(SimpleNamespace(size=2, devices=devices), dtype)
    times = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr(pace.time, "perf_counter", times.__next__)
    clock.tick(8, 100, 1e12)
    clock.tick(4, 60, 4e12)
    clock.tick(4, 60, 4e12)  # the second step took two seconds
    expected = {"examples_per_second": 2.0, "tokens_per_second": 30.0, "tflops_per_device": 1.0}
    assert clock.rate == expected | ({} if mfu is None else {"mfu": pytest.approx(mfu)})
