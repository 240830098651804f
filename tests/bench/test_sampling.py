"""Sampling cases: lengths are those of the case, counted as they were drawn."""

import jax
import pytest

from halos_jax.bench.sampling import peak_memory_gib, run_sampling_case
from halos_jax.bench.workloads import get_case


def test_fixed_lengths_are_fixed_and_varied_ones_geometric(config, mesh1, ceilings):
    with jax.set_mesh(mesh1):
        fixed = run_sampling_case(get_case("decode_1b", tiny=True), config, mesh1, ceilings)
        varied = run_sampling_case(get_case("sample_1b_varied", tiny=True), config, mesh1, ceilings)
    assert fixed["mean_tokens"] == fixed["max_tokens"] == 8
    assert 4 < varied["mean_tokens"] < 9  # one token in six ends a response
    assert varied["max_tokens"] > 12
    for found, samples in ((fixed, 8), (varied, 64)):
        rate = samples * found["mean_tokens"] / found["seconds"]
        assert found["tokens_per_second"] == pytest.approx(rate)
        assert found["of_copy_ceiling"] > 0


def test_memory_is_unknown_or_positive():
    peak = peak_memory_gib()
    assert peak is None or peak > 0
