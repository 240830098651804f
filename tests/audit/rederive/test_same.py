"""Whether this job runs on what a stage was computed on."""

import jax
import pytest

from halos_jax.audit.rederive import same
from halos_jax.config import Config
from halos_jax.workdir import execution
from halos_jax.workdir.changes import History
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("run"), Config()
    info = RunInfo(workdir, False, True, History(config), no_ledger(workdir))
    mesh = jax.make_mesh((jax.device_count(), 1, 1), ("data", "fsdp", "tensor"))
    return Workspace(config, info, mesh, None)


def make_manifest(*records):
    named = {execution.name_record(one): one for one in records}
    return Manifest(1, executions=named, executed={"train": tuple(named)})


def test_equal_records_mean_equal_bits(workspace):
    record = execution.describe_execution(workspace.config, workspace.mesh)
    manifest = make_manifest(record)
    assert same.is_same(workspace, manifest, "train")
    assert same.explain_other(workspace, manifest, "train") == ""


def test_any_other_execution_of_the_stage_means_a_tolerance(workspace):
    record = execution.describe_execution(workspace.config, workspace.mesh)
    other = record | {"devices": 9, "flags": {"XLA_FLAGS": ["--a"]}}
    manifest = make_manifest(record, other)
    assert not same.is_same(workspace, manifest, "train")
    said = same.explain_other(workspace, manifest, "train")
    assert said.startswith("it was computed on something else (devices, flags.XLA_FLAGS")


def test_what_is_not_recorded_or_not_deterministic_is_not_the_same(workspace):
    record = execution.describe_execution(workspace.config, workspace.mesh)
    assert not same.is_same(workspace, Manifest(1), "train")
    said = same.explain_other(workspace, Manifest(1), "train")
    assert said == "what it was computed on is not recorded"
    assert not same.is_same(workspace, make_manifest(record | {"deterministic": False}), "train")
