"""What a stored type rounds away: measured as what moved, and said once."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halos_jax.config import OptimizerConfig
from halos_jax.losses import get_loss
from halos_jax.training import optim, rounding, step
from halos_jax.types import TrainState


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        ("bfloat16", {"learning_rate": 5e-7}, True),
        ("bfloat16", {"learning_rate": 9e-6, "name": "lion"}, True),
        ("bfloat16", {"learning_rate": 1e-5}, False),
        ("bfloat16", {"learning_rate": 5e-7, "name": "sgd"}, False),
        ("float32", {"learning_rate": 5e-7}, False),
    ],
)
def test_updates_that_bfloat16_rounds_away_are_said(caplog, dtype, options, said):
    rounding.warn_of_rounding(OptimizerConfig(**options), dtype)
    assert ("most weights will stay as they are" in caplog.text) == said


def test_the_share_is_of_the_narrow_weights_that_have_a_gradient():
    before = {
        "a": jnp.ones((4, 5), jnp.bfloat16),
        "b": jnp.ones(4, jnp.float16),
        "value": {"c": jnp.ones(100)},
    }
    after = {
        "a": before["a"].at[0, :3].set(2),
        "b": before["b"].at[3].set(0),
        "value": {"c": jnp.zeros(100)},
    }
    every = jax.tree.map(jnp.ones_like, before)
    assert rounding.measure_moved(before, after, every) == pytest.approx(4 / 24)
    assert rounding.measure_moved(before, before, every) == 0
    assert rounding.measure_moved(before["value"], after["value"], every["value"]) is None
    some = every | {"a": every["a"].at[1:].set(0).at[0, 0].set(0)}  # 4 of row 0 left, 2 moved
    assert rounding.measure_moved(before, after, some) == pytest.approx((2 + 1) / (4 + 4))
    none = jax.tree.map(jnp.zeros_like, before)
    assert rounding.measure_moved(before, before, none) == 1


def test_more_weights_than_float32_can_count_are_counted():
    before = jnp.zeros((3, 2**23), jnp.bfloat16)
    after = before + 1
    assert jax.jit(rounding.measure_moved)({"w": before}, {"w": after}, {"w": after}) == 1


@pytest.mark.parametrize(("rate", "expected"), [(1 / 512, 0.5), (1 / 64, 1.0), (1e-6, 0.0)])
def test_an_update_below_half_a_place_moves_nothing(rate, expected):
    # Places of bfloat16 are 1/128 of a weight apart above it, 1/256 below: half of them is lost.
    params = {"w": jnp.array([1.0, 1.0, 0.25, 0.25], jnp.bfloat16)}
    gradient = {"w": jnp.array([-1.0, -1.0, 1.0, -1.0], jnp.bfloat16)}
    optimizer = optax.sgd(rate)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert rounding.measure_moved(params, after, gradient) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_measures_what_it_moves(one, params, tiny, make_varied, dtype):
    decoder = dataclasses.replace(tiny, params_dtype=dtype)
    placed = jax.tree.map(lambda x: jax.device_put(x.astype(dtype)), params)
    batch, loss, shares = make_varied("ipo")(1, 1), get_loss({"name": "ipo"}), {}
    gradient = step.loss_and_gradient(placed, None, batch, loss, decoder)[1]
    has_gradient = np.concatenate([(np.asarray(x) != 0).ravel() for x in jax.tree.leaves(gradient)])
    for rate in (1e-7, 1e-2):
        settings = OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=0)
        schedule = optim.make_schedule(settings, 4)
        optimizer = optim.make_optimizer(settings, schedule)
        whole = {"loss": loss, "optimizer": optimizer, "schedule": schedule, "config": decoder}
        state = TrainState(jnp.int32(0), placed, optimizer.init(placed))
        after, metrics = jax.jit(functools.partial(step.train_step, **whole))(state, None, batch)
        shares[rate] = metrics.get("moved_params")
        pairs = zip(jax.tree.leaves(placed), jax.tree.leaves(after.params), strict=True)
        moved = np.concatenate([(np.asarray(x) != np.asarray(y)).ravel() for x, y in pairs])
        if dtype == "bfloat16":
            assert shares[rate] == pytest.approx(moved[has_gradient].mean(), abs=1e-3)
    if dtype == "float32":
        assert shares == {1e-7: None, 1e-2: None}
    else:
        assert shares[1e-7] < 0.1 < 0.9 < shares[1e-2]


def test_the_steps_behind_the_warm_up_are_watched():
    settings = OptimizerConfig(warmup_steps=20)
    assert rounding.choose_watched(settings, 100) == range(21, 31)
    assert rounding.choose_watched(settings, 25) == range(21, 26)
    assert rounding.choose_watched(OptimizerConfig(warmup_steps=0), 3) == range(1, 4)


@pytest.mark.parametrize(
    ("shares", "first", "said"),
    [
        (
            [0.9, 0.02, 0.04, 0.9, 0.9],
            1,
            "changed 3 % of the weights with a gradient, on average over steps 2 to 3;",
        ),
        (
            [0.02, 0.04],
            2,
            "changed 3 % of the weights with a gradient, on average over steps 2 to 3;",
        ),
        (
            [0.04, 0.9, 0.9],
            3,
            "changed 4 % of the weights with a gradient, on average over steps 3 to 3;",
        ),
        ([0.0, 0.05, 0.2], 1, None),  # 12.5 %
        ([0.0, 0.0], 1, None),  # the stage ends before the watched steps do
        ([0.0, 0.0], 4, None),  # a later stage
        ([None] * 5, 1, None),
    ],
)
def test_few_moved_weights_are_said_once(caplog, shares, first, said):
    watch = rounding.MovedWatch(range(2, 4))
    for number, share in enumerate(shares, first):
        watch.see(number, {} if share is None else {"moved_params": jnp.float32(share)})
    watch.finish()
    lines = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(lines) == (said is not None)
    assert said is None or (said in lines[0] and "--config.model.params_dtype=float32" in lines[0])
