"""Division that rounds up: by its definition, beyond what floating point holds too."""

import pytest

from halos_jax.integers import divide_up, round_up


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_the_parts_hold_what_is_divided_and_one_less_does_not(size):
    for count in (0, 1, 6, 7, 8, 9, 63, 64, 65, 10**18 + 1):
        parts = divide_up(count, size)
        assert (parts - 1) * size < count <= parts * size
        assert round_up(count, size) == parts * size
