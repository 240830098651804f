"""Which fields of the config say what is taken of which source."""

from halos_jax.config import DataConfig
from halos_jax.data.selection import select_eval, select_test, select_train

DATA = DataConfig(
    train_split="a",
    eval_split="b",
    test_split="c",
    max_train=1,
    max_eval=2,
    max_test=3,
    collapse_whitespace=True,
)


def test_each_source_has_a_split_and_a_limit_of_its_own():
    found = [select_train(DATA, 9), select_eval(DATA), select_test(DATA)]
    assert [(one.split, one.limit, one.seed) for one in found] == [
        ("a", 1, 9),
        ("b", 2, 0),
        ("c", 3, 0),
    ]
    assert all(one.collapse and not one.holdout and not one.is_held for one in found)


def test_what_is_held_out_of_the_training_data_is_of_their_split():
    data = DataConfig(train="t", train_split="a", test="e", test_split="c", holdout=4)
    train, held, test = select_train(data, 9), select_eval(data), select_test(data)
    assert (train.holdout, train.is_held, train.split) == (4, False, "a")
    assert (held.holdout, held.is_held, held.split, held.limit) == (4, True, "a", 0)
    assert (test.holdout, test.is_held, test.split) == (0, False, "c")
    assert data.held_out == "t" and DataConfig(train="t").held_out == ""


def test_held_out_data_of_their_own_come_first():
    """As task=eval has them, whose config may be that of a run with a holdout."""
    data = DataConfig(train="t", eval="e", eval_split="b", holdout=4)
    assert (select_eval(data).holdout, select_eval(data).split) == (0, "b")
    assert data.held_out == "e"
