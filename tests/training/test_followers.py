"""The moving reference and the average, step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halos_jax.losses import get_loss
from halos_jax.models.lora import Adapter, Frozen
from halos_jax.models.spec import abstract_params
from halos_jax.training import inputs
from halos_jax.training import step as steps
from halos_jax.training.followers import Followers
from halos_jax.training.state import init_state, make_abstract_state
from halos_jax.types import Batch, TrainState


@pytest.mark.parametrize("sync_every", [1, 3])
def test_the_reference_and_the_average_follow_the_policy(
    one, make_varied, tiny, params, sync_every
):
    followers = Followers(sync_every, ema_decay=0.75)
    optimizer, schedule = optax.sgd(3.0), lambda step: 3.0
    settings = {"name": "kto", "humanline": True}
    batch = make_varied("kto")(1, 2)
    abstract = make_abstract_state(abstract_params(tiny, one), optimizer, one, followers)
    params = jax.tree.map(jnp.array, params)
    state = init_state(params, optimizer, abstract)
    run = steps.compile_train_step(
        abstract, get_loss(settings), optimizer, schedule, tiny, one, followers
    )
    evaluate = steps.compile_eval_step(get_loss(settings), tiny, one)
    logps = inputs.compile_logps(tiny, one)
    history, average = [jax.device_get(state.params)], jax.device_get(state.params)
    for step in range(5):
        # The one before; of three steps the policy at the last multiple that has passed.
        back = history[max((step - 1) // sync_every * sync_every, 0)]
        before = jax.device_get(state)
        for ours, theirs in zip(
            jax.tree.leaves(before.reference), jax.tree.leaves(back), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        state, metrics = run(state, None, batch)
        # The step's metrics are those of the policy before it, held against that reference.
        held = batch.replace(reference_logps=np.asarray(logps(back, None, batch)))
        sums = jax.device_get(evaluate(before.params, None, held))
        for name in ("loss", "rewards/KL_estimate", "rewards/chosen"):
            total, count = sums[name]
            np.testing.assert_allclose(metrics[name], total / count, rtol=1e-4, atol=1e-5)
        history.append(jax.device_get(state.params))
        average = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, average, history[-1])
    assert abs(metrics["rewards/chosen"]) > 1e-3, "the policy has not moved"
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for leaf, promised in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)


def test_a_step_has_its_own_dropout_rate_and_moving_reference(monkeypatch):
    seen = []

    def loss_and_gradient(params, frozen, batch, loss, config, teacher):
        assert teacher is None
        seen.append((jax.random.key_data(frozen.dropout_key), batch.reference_logps))
        return 0.0, {"w": jnp.ones(2)}, {}

    monkeypatch.setattr(steps, "loss_and_gradient", loss_and_gradient)
    monkeypatch.setattr(steps, "compute_step_logps", lambda params, *rest: params["w"] * 10)
    reference, params = ({"w": jnp.full(2, x)} for x in (5.0, 1.0))
    optimizer, schedule = optax.sgd(0.25), lambda step: 0.5 * step
    state = TrainState(jnp.int32(7), params, optimizer.init(params), reference=reference)
    after, metrics = steps.train_step(
        state,
        Frozen({}, Adapter(1, 1.0, (), dropout=0.5, seed=9)),
        Batch(**dict.fromkeys(field.name for field in dataclasses.fields(Batch))),
        loss=get_loss({"name": "dpo"}),
        optimizer=optimizer,
        schedule=schedule,
        config=None,
        followers=Followers(sync_every=2),
    )
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(9), 7))
    np.testing.assert_array_equal(seen[0][0], expected)
    np.testing.assert_array_equal(seen[0][1], [50.0, 50.0])
    # The rate that this step, the eighth, is taken at.
    assert metrics["counters/lr"] == 3.5 and after.step == 8
    np.testing.assert_array_equal(after.params["w"], [0.75, 0.75])
    np.testing.assert_array_equal(after.reference["w"], reference["w"])
