"""The defaults that a seal leaves out, and those of the first seals, which did not name them."""

import json
from pathlib import Path

import pytest

from halos_jax import losses
from halos_jax.config import Config
from halos_jax.workdir.seals import defaults

# What the version had that made the first seals: field -> default; "losses": name -> the same.
FIRST = json.loads(Path(__file__).with_name("first_defaults.json").read_text())


def test_defaults_are_those_of_what_results_depend_on():
    found = defaults.list_defaults(Config(loss={"name": "kto", "beta": 0.3}, seed=5))
    assert found["seed"] == 0 and found["loss.beta"] == 0.1 and found["sampling.top_p"] == 0.95
    others = {"workdir", "model.path", "data.train", "progress", "verify.steps", "model.remat"}
    assert not others & found.keys()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("loss", FIRST["losses"])
def test_the_first_seals_still_hold(loss):
    """They name no defaults: what has another one since must have its first in `BEFORE_AUTO`."""
    found = defaults.list_defaults(Config(loss={"name": loss}))
    expected = FIRST["fields"] | FIRST["losses"][loss]
    assert {path: found.get(path) for path in expected} == expected
    assert set(losses.list_losses()) >= FIRST["losses"].keys()


def test_the_name_of_defaults_is_that_of_their_content():
    one = defaults.list_defaults(Config())
    assert defaults.name_defaults(one) == defaults.name_defaults(dict(reversed(one.items())))
    assert defaults.name_defaults(one | {"seed": 1}) != defaults.name_defaults(one)
    assert defaults.name_defaults({}) == ""
