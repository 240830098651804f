"""A config of the tiny benchmark, and ceilings that make fractions easy to check."""

import dataclasses

import pytest

from halos_jax.bench.ceilings import Ceilings
from halos_jax.config import Config


@pytest.fixture
def ceilings():
    return Ceilings(flops=1e15, bytes=1e15)


@pytest.fixture
def config(tmp_path):
    made = Config()
    change = dataclasses.replace
    return change(
        made,
        task="bench",
        workdir=str(tmp_path / "bench"),
        progress=False,
        model=change(made.model, compute_dtype="float32", remat="none"),
        reward=change(made.reward, compute_dtype="float32"),
        sampling=change(made.sampling, slots=16, chunk=8),
        train=change(made.train, row_multiple=64, batch_size=8),
        bench=change(made.bench, steps=2, tiny=True),
    )
