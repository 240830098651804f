"""The tasks that train once, made again; whole tasks are in tests/e2e."""

import json

import jax
import pytest

from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive.single import courses
from halos_jax.config import Config, VerifyConfig
from halos_jax.workdir import execution
from halos_jax.workdir.changes import History
from halos_jax.workdir.execution import Start
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace


def check(tmp_path, **verify):
    config = Config(task="sft", verify=VerifyConfig(**verify))
    return courses.check_course(
        Opened("sft", tmp_path, History(config), config, no_ledger(tmp_path), ())
    )


def test_no_step_is_taken_where_none_is_wanted_or_none_was(tmp_path):
    assert check(tmp_path, steps=0) == []
    (found,) = check(tmp_path, steps=1)
    assert (found.outcome, found.why) == ("not checked", "no step has been taken yet")


def test_steps_are_counted_by_their_losses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "loss/eval": 1.0}, {"step": 1, "loss/train": 1.0}]
    rows += [{"step": 2, "loss/train": 1.0}, {"step": 9, "loss/eval": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert courses._count_taken(path) == 2


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ([], False),
        ([{}], True),
        ([{"devices": 99}, {}], False),
        ([{"deterministic": False}], False),
    ],
)
def test_each_start_of_the_run_must_have_been_on_the_same(tmp_path, changes, is_same):
    config = Config()
    info = RunInfo(tmp_path, False, True, History(config), no_ledger(tmp_path))
    mesh = jax.make_mesh((jax.device_count(), 1, 1), ("data", "fsdp", "tensor"))
    workspace = Workspace(config, info, mesh, StopSignal())
    record = execution.describe_execution(config, mesh)
    starts = [Start(0, "", record | change) for change in changes]
    lines = [json.dumps({"round": 0, "stage": "", "execution": one.execution}) for one in starts]
    if lines:
        (tmp_path / execution.FILE).write_text("\n".join(lines) + "\n")
    assert courses.is_same_throughout(tmp_path, workspace) is is_same
