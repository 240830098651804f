"""SimPO, SLiC, ORPO and the SFT term against their formulas in float64."""

import numpy as np
import pytest

from halos_jax.losses import get_loss, list_losses
from halos_jax.types import CHOSEN, REJECTED

PAIR = (CHOSEN, REJECTED)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def log_odds(mean):
    return np.log(np.exp(mean) / (1 - np.exp(mean)))


# name -> (settings, loss of one pair from sums S and means M by token of log p).
FORMULAS = {
    "simpo": (
        {"beta": 2.0, "gamma_beta_ratio": 0.4},
        lambda S, M: -log_sigmoid(2.0 * (M[0] - M[1]) - 0.8),
    ),
    "slic": (
        {"beta": 3.0, "lambda_coef": 0.2},
        lambda S, M: max(0, 3.0 - S[0] + S[1]) - 0.2 * S[0],
    ),
    "orpo": (
        {"beta": 0.3},
        lambda S, M: -M[0] - 0.3 * log_sigmoid(log_odds(M[0]) - log_odds(M[1])),
    ),
    "nll": ({}, lambda S, M: -M[0]),
}


def test_every_loss_on_pairs_without_a_reference_has_its_formula_here():
    losses = [get_loss({"name": name}) for name in list_losses()]
    pairs = [loss for loss in losses if loss.items == "pair" and loss.needs == "logps"]
    assert {loss.name for loss in pairs if not loss.reference} == {*FORMULAS}


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_equal_the_formula(pack, draw_logps, compare, name):
    packed = pack(PAIR, num_rows=3, weights=True)
    weights = np.array([item.weight for item in packed.items])
    settings, formula = FORMULAS[name]

    def mean(policy):
        losses = [
            formula([part.sum() for part in parts], [part.mean() for part in parts])
            for parts in policy
        ]
        return np.sum(weights * losses) / np.sum(weights)

    _, metrics, _ = compare(
        packed, {"name": name, **settings}, {"policy": draw_logps(packed, 1)}, mean
    )
    assert metrics["logps/chosen"][1] == 7
    assert not get_loss({"name": name}).reference


def test_defaults_are_those_of_halos(pack, draw_logps, compare):
    packed = pack(PAIR)

    def simpo(policy):
        means = [[part.mean() for part in parts] for parts in policy]
        return np.mean([-log_sigmoid(10.0 * (c - j - 0.3)) for c, j in means])

    def slic(policy):
        sums = [[part.sum() for part in parts] for parts in policy]
        return np.mean([max(0, 1.0 - c + j) - 0.1 * c for c, j in sums])

    for formula in (simpo, slic):
        tokens = {"policy": draw_logps(packed, 1)}
        compare(packed, {"name": formula.__name__}, tokens, formula)


def test_slic_stays_one_number_a_pair(pack, draw_logps, compare):
    # A sum of [B] and [B, T] terms would not even have a shape for more than one pair.
    packed = pack(PAIR, count=1)
    policy = draw_logps(packed, 3)
    formula = lambda x: max(0, 1 - x[0][0].sum() + x[0][1].sum()) - 0.1 * x[0][0].sum()  # noqa: E731
    compare(packed, {"name": "slic"}, {"policy": policy}, formula)
