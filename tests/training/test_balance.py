"""What binary feedback's classes weigh, and the weights that would balance them."""

import logging

import numpy as np
import pytest

from halos_jax.training.balance import report_balance
from halos_jax.types import TARGET, Item


def make_judged(desirable, undesirable):
    labels = [True] * desirable + [False] * undesirable
    return [Item(np.ones(1, int), (np.ones(1, int),), (TARGET,), desirable=one) for one in labels]


@pytest.mark.parametrize(
    ("counts", "settings", "advice"),
    [
        ((1, 2), {"name": "kto"}, (2.31, 1)),  # 2 to 2 4/3 are balanced, in the middle 2.31
        ((3, 1), {"name": "kto"}, (1, 2.6)),
        ((8, 7), {"name": "kto", "undesirable_weight": 1.2}, (1, 1)),
        ((1, 2), {"name": "sum", "kto": {"weight": 0.5}}, (2.31, 1)),
        ((1, 1), {"name": "kto"}, None),
        ((4, 3), {"name": "kto"}, None),
        ((1, 3), {"name": "kto", "desirable_weight": 3.0}, None),
        ((1, 3), {"name": "bco"}, None),
        ((3, 0), {"name": "kto"}, None),
        ((1, 3), {"name": "kto", "undesirable_weight": 0.0}, None),
    ],
)
def test_weights_are_suggested_where_the_classes_are_out_of_balance(
    caplog, counts, settings, advice
):
    with caplog.at_level(logging.INFO):
        report_balance(make_judged(*counts), settings)
    assert f"{counts[0]} desirable and {counts[1]} undesirable answers" in caplog.text
    assert ("outside of 1 to 4/3" in caplog.text) == (advice is not None)
    if advice:
        assert "loss.desirable_weight={:.3g} loss.undesirable_weight={:.3g}".format(*advice) in (
            caplog.text
        )
        followed = {"desirable_weight": advice[0], "undesirable_weight": advice[1]}
        caplog.clear()
        report_balance(make_judged(*counts), {"name": "kto"} | followed)
        assert "outside" not in caplog.text
