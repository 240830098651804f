"""mode=verify on a finished run: as it was written, and after it was tampered with.

Every kind of tampering is tried on a copy of one run, once by somebody who edits a file and no
more, and some of them by somebody who makes hashes again. Only hashes are compared here.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from halos_jax.audit import run as audit
from halos_jax.cli.presets import load_preset
from halos_jax.config import Config, VerifyConfig, freeze
from halos_jax.storage import hash_file
from halos_jax.workdir import ledger
from halos_jax.workdir.manifests import FileRecord, load_manifest, save_manifest
from halos_jax.workdir.seals import certificate, chain
from tests.e2e.tampering import RULES, SCORES, TAMPERING, edit_json, edit_row
from tests.e2e.test_tampering import stop_run

MORE = ("checkpoint.keep=3", "sampling.keep_logps=true", "reward.rules=watched_rules:long_answer")


@pytest.fixture(scope="module")
def clean(program, inputs, tmp_path_factory):
    """Return a folder with a finished run, `run`, that keeps the checkpoints of both rounds."""
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(inputs, folder / "inputs")
    tiny = f"--config={Path(__file__).with_name('tiny.py')}:{folder / 'inputs'}"
    arguments = [tiny, f"--config.workdir={folder / 'run'}"]
    arguments += [f"--config.{override}" for override in MORE]
    code, _, errors = program.run_with(arguments, folder / "run")
    assert (code, errors) == (0, "")
    return folder


@pytest.fixture
def copy(clean, tmp_path, monkeypatch):
    """Return a copy of the run and of all that it has read, which its records lead to."""
    moved = tmp_path / "copy"
    shutil.copytree(clean / "run", moved)
    rules = tmp_path / "code"
    rules.mkdir()
    shutil.copy(RULES, rules)
    monkeypatch.syspath_prepend(rules)
    return moved


def verify(workdir: Path, **fields) -> list[audit.Finding]:
    """Return what a verification by hashes alone finds."""
    config = freeze(load_preset(str(workdir / "config.json")))
    settings = VerifyConfig(**{"derive": False, **fields})
    return list(audit.verify(dataclasses.replace(config, verify=settings)))


def list_wrong(workdir: Path) -> list[str]:
    """Return "check: why" of all that differs."""
    return [f"{one.check}: {one.why}" for one in verify(workdir) if one.outcome == "differs"]


@pytest.fixture
def inputs_kept(clean):
    """Put the inputs back after a test has changed them."""
    kept = clean / "kept"
    if not kept.exists():
        shutil.copytree(clean / "inputs", kept)
    yield
    shutil.rmtree(clean / "inputs")
    shutil.copytree(kept, clean / "inputs")


def test_a_run_as_it_was_written_passes(copy):
    found = verify(copy)
    assert [one for one in found if one.outcome == "differs"] == []
    looked = {one.check for one in found if one.outcome == "passed"}
    assert looked >= {"records", "ledger", "files", "checkpoints", "chain", "metrics", "inputs"}
    assert "certificate" in looked
    renewed = certificate.read_certificate(certificate.find_certificate(copy))
    assert renewed["verified"]["counts"]["differs"] == 0
    assert list_wrong(copy) == []


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_found(copy, inputs_kept, kind):
    edit, said = TAMPERING[kind]
    edit(copy)
    wrong = list_wrong(copy)
    assert any(said in line for line in wrong), wrong


@pytest.mark.parametrize("stop", ["0 evaluate", "1 train", "2 sample"])
def test_a_run_that_was_stopped_passes_as_far_as_it_came(program, finished, tmp_path, stop):
    workdir = stop_run(program, tmp_path, stop, finished[1])
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    found = verify(workdir)
    assert [one for one in found if one.outcome == "differs"] == []
    (rest,) = (one for one in found if one.what == "the rest of the run")
    assert rest.outcome == "not checked" and "under way, or was stopped" in rest.why
    assert {path: path.read_bytes() for path in before} == before, "it only reads"
    if stop != "1 train":
        return
    code, _, errors = program.run(workdir)
    assert (code, errors) == (0, "")
    assert list_wrong(workdir) == []


def test_the_command_exits_with_1_where_something_differs(program, copy):
    arguments = [f"--config={copy / 'config.json'}", "--config.mode=verify"]
    arguments += ["--config.verify.derive=false"]
    code, output, errors = program.run_with(arguments, copy)
    assert (code, errors) == (0, "") and "0 differs" in output
    edit_row(SCORES, {"reward": 9.5})(copy)
    code, output, errors = program.run_with(arguments, copy)
    assert code == 1 and "Traceback" not in output + errors
    assert errors.startswith("VerificationError: ") and "round 1, files: scores.jsonl" in errors
    assert "scores.jsonl has sha256" in output
    record = json.loads((copy / "verification.json").read_text())
    assert record["counts"]["differs"] >= 1


# --------------------------------------------------------------------------- with hashes made again


def hash_again(workdir: Path) -> None:
    """Make the manifests' hashes of their files, and the whole ledger, again."""
    for folder in sorted((workdir / "rounds").iterdir()):
        manifest = load_manifest(folder)
        files = {
            name: FileRecord(hash_file(folder / name), one.count)
            for name, one in manifest.files.items()
        }
        if files != manifest.files:
            save_manifest(folder, dataclasses.replace(manifest, files=files))
    lines = [json.loads(line) for line in (workdir / ledger.FILE).read_text().splitlines()]
    last = {line["path"]: at for at, line in enumerate(lines)}
    before, written = "", []
    for at, line in enumerate(lines):
        path = workdir / line["path"]
        if "size" in line and path.is_file() and last[line["path"]] == at:
            line |= {"size": path.stat().st_size, "sha256": hash_file(path)}
        line.pop("chain")
        before = ledger._chain(before, line)
        written.append(json.dumps(line | {"chain": before}) + "\n")
    (workdir / ledger.FILE).write_text("".join(written))


def seal_again(workdir: Path) -> None:
    """Make the chain of manifests again."""
    before = ""
    for folder in sorted((workdir / "rounds").iterdir()):
        manifest = load_manifest(folder)
        facts = {
            name: one
            for name, one in manifest.chain.items()
            if name not in ("previous", "digest", "added", "added_digest")
        }
        manifest = chain.seal(dataclasses.replace(manifest, chain={}), before, facts)
        save_manifest(folder, manifest)
        before = manifest.chain["digest"]


def test_a_score_with_the_hash_of_its_file_made_again_breaks_the_ledger(copy):
    edit_row(SCORES, {"reward": 9.5})(copy)
    manifest = load_manifest(copy / "rounds" / "0001")
    name = "scores.jsonl"
    record = FileRecord(hash_file(copy / SCORES), manifest.files[name].count)
    files = {**manifest.files, name: record}
    save_manifest(copy / "rounds" / "0001", dataclasses.replace(manifest, files=files))
    wrong = list_wrong(copy)
    assert any("rounds/0001/manifest.json has" in line for line in wrong), wrong
    assert any("round 1: its digest is not that of its content" in line for line in wrong), wrong


def test_a_score_with_the_whole_ledger_made_again_breaks_the_chain(copy):
    edit_row(SCORES, {"reward": 9.5})(copy)
    hash_again(copy)
    wrong = list_wrong(copy)
    assert any("round 1: its digest is not that of its content" in line for line in wrong), wrong
    assert any("of another run, or newer than the run's ledger" in line for line in wrong), wrong


def test_a_score_with_the_chain_made_again_breaks_the_certificate(copy):
    edit_row(SCORES, {"reward": 9.5})(copy)
    hash_again(copy)
    seal_again(copy)
    hash_again(copy)
    wrong = list_wrong(copy)
    assert not any("digest" in line for line in wrong), wrong
    assert any("chain is not that of the workdir" in line for line in wrong), wrong


def test_another_config_is_found_even_if_the_ledger_is_made_again(copy):
    edit_json("config.json", lambda one: one["sampling"].update(temperature=0.5))(copy)
    hash_again(copy)
    assert any("round 1 had another config" in line for line in list_wrong(copy))


def test_the_twenty_kinds_are_more_than_twenty():
    assert len(TAMPERING) >= 30
    assert Config().verify.derive
