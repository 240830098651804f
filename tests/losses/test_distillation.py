"""The loss of distillation, and which settings of a teacher make sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, check_loss, get_loss
from halos_jax.losses.terms import Divergence
from halos_jax.types import TARGET

GKD = {"name": "gkd"}


@pytest.mark.parametrize("weights", [False, True])
def test_gkd_is_the_mean_divergence_over_all_response_tokens(pack, draw_logps, weights):
    packed = pack((TARGET,), num_rows=4, weights=weights)
    divergences, policy, teacher = (draw_logps(packed, seed) for seed in range(3))

    def run(values):
        inputs = LossInputs(
            divergences=values, policy=packed.place(policy), teacher=packed.place(teacher)
        )
        return get_loss(GKD)(inputs, packed.batch)

    placed = jnp.asarray(packed.place(divergences, padding=0.0))
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(placed)
    tokens = sum(len(part) for (part,) in divergences)
    total = sum(item.weight * part.sum() for item, (part,) in zip(packed.items, divergences))
    np.testing.assert_allclose(value, total / tokens, rtol=1e-6)
    slopes = [(np.full(len(part), item.weight / tokens),) for item, (part,) in
              zip(packed.items, divergences)]  # fmt: skip
    np.testing.assert_allclose(gradient, packed.place(slopes), rtol=1e-6)
    ratios = [one - other for (one,), (other,) in zip(policy, teacher)]
    total, count = metrics["rewards/log_ratio"]
    np.testing.assert_allclose(total, sum(ratio.sum() for ratio in ratios), rtol=1e-5)
    assert count == tokens
    for name, drawn in (("policy", policy), ("teacher", teacher)):
        total, count = metrics[f"logps/{name}"]
        np.testing.assert_allclose(total, sum(part.sum() for (part,) in drawn), rtol=1e-6)
        assert count == len(packed.items)


def test_beta_and_temperature_are_those_of_the_divergence():
    assert get_loss(GKD).divergence == Divergence(0.5, 1.0)
    assert get_loss(GKD | {"beta": 1, "temperature": 0.9}).divergence == Divergence(1, 0.9)
    assert get_loss({"name": "sum", "gkd": {"weight": 2.0, "beta": 0.0}}).divergence.beta == 0
    assert get_loss({"name": "sft"}).divergence is None
    assert check_loss(GKD | {"beta": 1.5}) == ["loss.beta: got 1.5, allowed: 0 or more, 1 at most"]
    assert check_loss(GKD | {"temperature": 0.0}) == [
        "loss.temperature: got 0.0, allowed: 0.001 or more"
    ]
    (line,) = check_loss(GKD | {"lmbda": 0.5})
    assert line.endswith("allowed: beta, temperature")
    (line,) = check_loss({"name": "sum", "gkd": {}, "sft": {}})
    assert "losses of different examples (gkd output, sft target)" in line
