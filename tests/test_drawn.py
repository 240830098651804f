"""What tokens were drawn from: kept as bytes, cut and tabulated by token."""

import doctest

import numpy as np

from halos_jax import drawn
from halos_jax.drawn import Drawn

KEPT = np.array([3, 8, 0, 1, 2, 7], "<i4").tobytes()


def test_the_example_holds():
    (found,) = doctest.DocTestFinder(recurse=False).find(Drawn, globs=vars(drawn))
    results = doctest.DocTestRunner(verbose=False).run(found)
    assert (results.attempted, results.failed) == (4, 0)


def test_the_table_has_each_tokens_ids_and_a_cut_keeps_the_first_tokens():
    made = Drawn(0.7, (-0.1, -0.5, 0.0), (2, 3, 1), KEPT)
    expected = [[3, 8, -1, -1], [0, 1, 2, -1], [7, -1, -1, -1]]
    assert made.tabulate(4).tolist() == expected
    assert made.cut(2).tabulate(4).tolist() == expected[:2]
    assert made.cut(2) == Drawn(0.7, (-0.1, -0.5), (2, 3), KEPT[:20])
    assert made.cut(9) == made


def test_without_sets_the_table_is_empty():
    made = Drawn(1.3, (-0.1, -0.5))
    assert made.cut(1) == Drawn(1.3, (-0.1,))
    assert made.tabulate(2).tolist() == [[-1, -1], [-1, -1]]
