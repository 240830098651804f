"""The registry: what it refuses and how it says so, what it binds, what a loss is divided by."""

import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, LossTerms, check_loss, get_loss, list_losses, registry
from halos_jax.types import CHOSEN, REJECTED


@pytest.fixture
def register(monkeypatch):
    """Return `register` on a copy of the registry that is gone after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return registry.register


def test_every_loss_of_this_stage_is_there():
    assert list_losses() == sorted(list_losses())
    assert {"dpo", "sft", "bradley-terry"} <= set(list_losses())
    for name in list_losses():
        assert check_loss({"name": name}) == []
        assert get_loss({"name": name}).name == name


@pytest.mark.parametrize("name", ["dpoo", None, 3, ["dpo"], ""])
def test_an_unknown_loss_lists_the_known(name):
    settings = {} if name is None else {"name": name}
    (line,) = check_loss(settings)
    assert line.startswith(f"loss.name: got {name!r}, allowed: ")
    assert "bradley-terry, dpo" in line
    with pytest.raises(ValueError, match=r"loss\.name: got"):
        get_loss(settings)


def test_all_errors_of_the_parameters_are_listed():
    lines = check_loss({"name": "dpo", "bta": 0.1, "zzz": 1, "beta": "0.1"})
    assert lines == [
        "loss.bta: 'dpo' has no such parameter; did you mean 'beta'; allowed: beta",
        "loss.zzz: 'dpo' has no such parameter; allowed: beta",
        "loss.beta: got '0.1', allowed: a finite number",
    ]
    assert check_loss({"name": "sft", "beta": 1.0}) == [
        "loss.beta: 'sft' has no such parameter; allowed: none"
    ]


@pytest.mark.parametrize("value", [True, None, "x", (0.1,), float("nan"), float("inf")])
def test_a_value_of_another_type_is_refused(value):
    (line,) = check_loss({"name": "dpo", "beta": value})
    assert line.startswith(f"loss.beta: got {value!r}, allowed: a finite number")


def test_whole_numbers_and_switches_are_accepted_where_they_fit(register):
    @register("switched")
    def switched(inputs, batch, *, scale: float = 1.0, on: bool = False):
        return LossTerms(jnp.float32(scale if on else 0), {})

    assert check_loss({"name": "switched", "scale": 2, "on": True}) == []
    assert len(check_loss({"name": "switched", "on": 1})) == 1


def test_a_name_is_taken_once(register):
    with pytest.raises(ValueError, match="'dpo' is registered already"):

        @register("dpo")
        def another(inputs, batch):
            return LossTerms(jnp.zeros(()), {})

    assert get_loss({"name": "dpo"}).reference


def test_parameters_are_bound_and_the_registered_loss_is_left_alone(register, pack):
    @register("constant", per="token", items="target")
    def constant(inputs, batch, *, value: float = 1.0):
        return LossTerms(jnp.float32(value), {"some/metric": (jnp.float32(3), jnp.float32(2))})

    packed = pack((CHOSEN, REJECTED))
    bound = get_loss({"name": "constant", "value": 5.0})
    assert (bound.per, bound.items, bound.needs, bound.reference) == (
        "token",
        "target",
        "logps",
        False,
    )
    for loss, value in ((bound, 5.0), (get_loss({"name": "constant"}), 1.0)):
        share, metrics = loss(LossInputs(), packed.batch)
        np.testing.assert_allclose(share, value / packed.batch.num_tokens)
        assert metrics["some/metric"] == (3, 2)
        assert metrics["loss"] == (share, 1)


def test_a_loss_per_example_is_divided_by_the_weights_of_the_step(register, pack):
    @register("four")
    def four(inputs, batch):
        return LossTerms(jnp.float32(4), {})

    packed = pack((CHOSEN, REJECTED), weights=True)
    share, _ = get_loss({"name": "four"})(LossInputs(), packed.batch)
    np.testing.assert_allclose(share, 4 / sum(item.weight for item in packed.items))
