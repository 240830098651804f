"""What fields are called elsewhere leads to fields that there are."""

import pytest

from halos_jax.config import Config, schema
from halos_jax.config.aliases import ALIASES, find_alias


def test_every_alias_is_of_a_field_and_is_none_itself():
    known = schema.leaf_types(Config)
    wrong = {
        name: path
        for name, path in ALIASES.items()
        if path not in known and not path.startswith("loss.")
    }
    assert wrong == {}
    assert [name for name in ALIASES if name in known] == []


@pytest.mark.parametrize(
    "name, path",
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("--LR", "optimizer.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("bs", "train.batch_size"),
        ("num-train-epochs", "train.epochs"),
        ("max_len", "train.max_length"),
        ("beta", "loss.beta"),
        ("use_peft", "lora.rank"),
        ("nothing", None),
    ],
)
def test_names_of_others(name, path):
    assert find_alias(name) == path
