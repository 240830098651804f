"""The scale of implicit rewards is the loss's own."""

import pytest

from halos_jax.signs.implicit import Scale, find_scale


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "dpo"}, Scale(0.1)),
        ({"name": "dpo", "beta": 0.03}, Scale(0.03)),
        ({"name": "dpo", "beta": 2}, Scale(2.0)),
        ({"name": "kto", "beta": 0.2}, Scale(0.2)),
        ({"name": "dpo_norm"}, Scale(5.0, by_token=True)),
        ({"name": "ipo", "tau": 0.3}, Scale(0.3, by_token=True)),
        ({"name": "simpo", "beta": 10.0}, Scale(0.1)),  # of no reference: its beta is another
        ({"name": "dapo"}, Scale(0.1)),
        (
            {
                "name": "sum",
                "nll": {"weight": 0.1},
                "hinge": {"weight": 2.0, "beta": 0.7},
                "dpo": {"weight": 1.0, "beta": 0.4},
            },
            Scale(0.7),
        ),
        ({"name": "sum", "nll": {"weight": 0.1}}, Scale(0.1)),
    ],
)
def test_the_scale_is_that_of_the_loss(settings, expected):
    assert find_scale(settings) == expected


def test_a_log_ratio_is_weighed_by_sequence_or_by_token():
    assert Scale(0.5).weigh(6.0, 4) == 3.0
    assert Scale(0.5, by_token=True).weigh(6.0, 4) == 0.75
