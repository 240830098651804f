"""Whether this job runs on what a stage was computed on."""

import jax
import jax.numpy as jnp
import pytest

from halos_jax.audit.rederive import same
from halos_jax.config import Config, ModelConfig
from halos_jax.tasks import launch
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


def test_weights_that_are_made_as_they_are_loaded_may_be_others_elsewhere(workspace):
    record = execution.describe_execution(workspace.config, workspace.mesh)
    here, elsewhere = make_manifest(record), make_manifest(record | {"devices": 9})
    read, drawn = ModelConfig(), ModelConfig(random_init=True)
    averaged = ModelConfig(added_tokens=("<a>",))
    for settings in (read, drawn, averaged):
        assert same.explain_made(settings, workspace, here, "train") == ""
    assert same.explain_made(read, workspace, elsewhere, "train") == ""
    for settings in (drawn, averaged):
        said = same.explain_made(settings, workspace, elsewhere, "train")
        assert said.endswith("here: it was computed on something else (devices)")


# --------------------------------------------------------------------------- programs


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Return a workdir with the compiled programs of a run, one of which is `double`."""
    monkeypatch.setattr(launch, "_XLA_CACHES", "")  # with it, jax 0.10 finds no copied program
    cache = tmp_path / "run" / "compilation_cache"
    with launch._restore_cache():
        launch._use_cache(cache)
        run_double()
        yield tmp_path / "run"


def run_double():
    def double(x):
        return x * 2 + 1

    return jax.jit(double)(jnp.float32(3)).block_until_ready()


def run_other():
    def other(x):
        return x * 3 + 1

    return jax.jit(other)(jnp.float32(3)).block_until_ready()


def test_programs_are_those_of_the_run_until_one_is_compiled_again(cached, tmp_path, monkeypatch):
    files = {path: path.read_bytes() for path in cached.rglob("*") if path.is_file()}
    assert any(path.name.startswith("jit_double-") for path in files)
    assert launch.list_compiled() is None
    launch.use_copied_cache(cached, tmp_path)
    run_double()
    assert launch.list_compiled() == []
    (found,) = same.check_programs(None)
    assert (found.outcome, found.why) == ("passed", "none had to be compiled again")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert same.explain_programs() == ""
    with launch.compile_aside():
        run_other()
    assert launch.list_compiled() == []

    def third(x):
        return x * 5 + 1

    jax.jit(third)(jnp.float32(3)).block_until_ready()
    assert launch.list_compiled() == ["jit_third"]
    assert same.explain_programs() == "programs had to be compiled again: jit_third"
    (found,) = same.check_programs(None)
    assert (found.outcome, found.why[:12]) == ("not checked", "1 had to be ")
    assert {path: path.read_bytes() for path in cached.rglob("*") if path.is_file()} == files


def test_without_the_runs_programs_a_gpu_promises_no_equal_bits(workspace, monkeypatch):
    assert same.explain_programs() == "" and list(same.check_programs(None)) == []
    monkeypatch.setattr(same.jax, "default_backend", lambda: "gpu")
    assert same.explain_programs() == (
        "the run's compiled programs (compilation_cache/) are not there"
    )
    record = execution.describe_execution(workspace.config, workspace.mesh)
    manifest = make_manifest(record | {"deterministic": True})
    monkeypatch.setattr(
        execution, "describe_execution", lambda *_: record | {"deterministic": True}
    )
    assert not same.is_same(workspace, manifest, "train")
    assert "compilation_cache" in same.explain_other(workspace, manifest, "train")


def test_programs_are_counted_by_name():
    assert same.name_programs(["jit_b", "jit_a", "jit_b"]) == "jit_a, 2 x jit_b"
    many = [f"jit_{number}" for number in range(10)]
    assert same.name_programs(many).endswith("jit_7 and 2 more")
