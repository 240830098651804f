"""The supervised loss: nats per response token, whatever the packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.losses import LossInputs, get_loss
from halos_jax.types import MISMATCHED, TARGET


def test_sft_is_the_mean_over_all_response_tokens(pack, draw_logps):
    loss = get_loss({"name": "sft"})
    for num_rows in (1, 4):
        packed = pack((TARGET,), num_rows=num_rows)
        logps = draw_logps(packed, 0)
        run = lambda x: loss(LossInputs(policy=x), packed.batch)[0]  # noqa: B023, E731
        flat = np.concatenate([part for (part,) in logps])
        for padding in (0.0, 1e6):
            placed = jnp.asarray(packed.place(logps, padding))
            value, gradient = jax.value_and_grad(run)(placed)
            np.testing.assert_allclose(value, -flat.mean(), rtol=1e-6)
            slopes = [(np.full(len(part), -1 / len(flat)),) for (part,) in logps]
            np.testing.assert_allclose(gradient, packed.place(slopes), rtol=1e-6)


def test_sft_reads_targets_alone_and_reports_sequence_logps(pack, draw_logps):
    packed = pack((TARGET, MISMATCHED))
    logps = draw_logps(packed, 0)
    value, metrics = get_loss({"name": "sft"})(LossInputs(policy=packed.place(logps)), packed.batch)
    target = sum(first.sum() for first, _ in logps)
    np.testing.assert_allclose(value * packed.batch.num_tokens, -target, rtol=1e-6)
    total, count = metrics["logps/chosen"]
    np.testing.assert_allclose(total, target, rtol=1e-6)
    assert count == 7


def test_weights_scale_each_example(pack, draw_logps):
    packed = pack((TARGET,), weights=True)
    logps = draw_logps(packed, 0)
    value, _ = get_loss({"name": "sft"})(LossInputs(policy=packed.place(logps)), packed.batch)
    weighted = sum(item.weight * part.sum() for item, (part,) in zip(packed.items, logps))
    tokens = sum(len(part) for (part,) in logps)
    np.testing.assert_allclose(value, -weighted / tokens, rtol=1e-6)


def test_csft_is_sft_whose_metrics_tell_good_answers_from_bad(pack, draw_logps):
    drawn = pack((TARGET,))
    items = [dataclasses.replace(x, desirable=i % 3 > 0) for i, x in enumerate(drawn.items)]
    packed = pack.of(items)
    logps = draw_logps(packed, 0)
    inputs = LossInputs(policy=packed.place(logps))
    value, metrics = get_loss({"name": "csft"})(inputs, packed.batch)
    np.testing.assert_allclose(value, get_loss({"name": "sft"})(inputs, packed.batch)[0], rtol=1e-6)
    for name, desirable in (("chosen", True), ("rejected", False)):
        sums = [p.sum() for item, (p,) in zip(items, logps) if item.desirable == desirable]
        total, count = metrics[f"logps/{name}"]
        np.testing.assert_allclose(total, sum(sums), rtol=1e-6)
        assert count == len(sums) > 1
