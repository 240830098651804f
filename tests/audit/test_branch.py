"""What a branch says of its start, against its first checkpoint and the run that it is of."""

import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from halos_jax.audit.branch import check_branch
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.config import BranchConfig, Config
from halos_jax.policies.branch import hash_policy
from halos_jax.workdir.manifests import Manifest


def save(workdir, value, position):
    checkpoints = open_checkpoints(workdir / "checkpoints", keep=1)
    state = {"params": {"w": jnp.full(3, value)}, "step": jnp.zeros((), jnp.int32)}
    checkpoints.save(position.step, state, position.to_dict())
    checkpoints.close()


@pytest.fixture
def opened(tmp_path):
    """Return a branch as the checks see it, of round 2 of a run that is still there."""
    save(tmp_path / "first", 1.0, Position(8, 2))
    origin = {
        "workdir": str(tmp_path / "first"),
        "round": 2,
        "checkpoint": 1,
        "optimizer": True,
        "fingerprint": "f",
        "sums": hash_policy(tmp_path / "first", 1),
        "manifest": "",
    }
    save(tmp_path / "second", 1.0, Position(0, 0, origin=origin))
    config = Config(branch=BranchConfig(workdir=str(tmp_path / "first"), round=2))
    manifests = (Manifest(round=0, origin=origin, trained="f"),)
    parts = {"is_online": True, "is_finished": False, "workdir": tmp_path / "second"}
    return SimpleNamespace(config=config, manifests=manifests, **parts)


def list_outcomes(opened):
    return [(one.outcome, one.why) for one in check_branch(opened)]


def test_a_branch_as_it_was_written_passes(opened):
    assert [outcome for outcome, _ in list_outcomes(opened)] == ["passed", "passed"]
    opened.config = Config()
    assert list_outcomes(opened) == []


def test_another_run_in_that_place_differs_and_one_that_is_gone_is_not_checked(opened, tmp_path):
    shutil.rmtree(tmp_path / "first")
    ((_, _), (outcome, why)) = list_outcomes(opened)
    assert outcome == "not checked" and "is gone, or has deleted that checkpoint" in why
    save(tmp_path / "first", 2.0, Position(8, 2))
    ((_, _), (outcome, why)) = list_outcomes(opened)
    assert outcome == "differs" and "holds another policy in that place" in why


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"origin": {"round": 3}, "trained": "f"}, "say different things of where it comes from"),
        ({"trained": "g"}, "round 0 has the policy g"),
    ],
)
def test_a_record_that_was_edited_differs(opened, fields, said):
    (before,) = opened.manifests
    opened.manifests = (Manifest(**{"round": 0, "origin": before.origin, **fields}),)
    outcome, why = list_outcomes(opened)[0]
    assert outcome == "differs" and said in why


def test_another_start_than_the_config_asks_for_and_none_at_all_differ(opened, tmp_path):
    opened.config = Config(branch=BranchConfig(workdir=str(tmp_path / "first"), round=1))
    assert list_outcomes(opened)[0] == ("differs", "config.json asks for another start")
    shutil.rmtree(tmp_path / "second" / "checkpoints")
    ((outcome, why),) = list_outcomes(opened)
    assert outcome == "differs" and why.startswith("there is no checkpoint of round 0")
