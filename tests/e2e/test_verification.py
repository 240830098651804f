"""mode=verify on a finished run: as it was written, and after it was tampered with.

Every kind of tampering is tried on a copy of one run, once by somebody who edits a file and no
more, and some of them by somebody who makes hashes again. Only hashes are compared here.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard

from halos_jax.audit import arrays
from halos_jax.checkpoints import saved
from halos_jax.checkpoints.store import open_checkpoints, read_checkpoints
from halos_jax.config import Config
from halos_jax.report import card
from halos_jax.storage import hash_file
from halos_jax.workdir import ledger
from halos_jax.workdir.manifests import FileRecord, load_manifest, save_manifest
from halos_jax.workdir.seals import certificate
from tests.e2e.tampering import (
    RULES,
    SCORES,
    TAMPERING,
    edit_json,
    edit_row,
    hash_again,
    list_wrong,
    seal_again,
    verify,
)
from tests.e2e.test_tampering import stop_run

MORE = (
    "checkpoint.keep=3",
    "sampling.keep_logps=true",
    "reward.rules=watched_rules:long_answer",
    "export.dtype=bfloat16",
)


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
    # The model card is the run's own, in the dtype that was asked for, with what was verified.
    text = (copy / "final" / "README.md").read_text()
    assert card.is_own(text) and text.count(renewed["chain"]["head"]) == 1
    assert "checks passed" in text and ModelCard(text).data.library_name == "transformers"
    exported = json.loads((copy / "final" / "config.json").read_text())
    assert exported["torch_dtype"] == "bfloat16"


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


@pytest.mark.parametrize("thorough", [False, True])
def test_seals_that_are_taken_off_with_the_ledger_made_again_are_missed(copy, thorough):
    """There is no certificate, and no checkpoint; some know what a version before seals wrote."""
    fields = ("chain", "executed", "executions", "sampled_by", "trained")

    def unseal(plain: dict) -> None:
        for name in fields if thorough else fields[:1]:
            plain.pop(name) if thorough else plain.update({name: {}})

    gone = ["final/certificate.json", *(["executions.jsonl"] if thorough else [])]
    for name in gone:
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints")
    for folder in sorted((copy / "rounds").iterdir()):
        edit_json(f"rounds/{folder.name}/manifest.json", unseal)(copy)
    lines = (copy / ledger.FILE).read_text().splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if json.loads(line)["path"] not in gone and "checkpoints/" not in line
    ]
    (copy / ledger.FILE).write_text("".join(kept))
    hash_again(copy)
    (wrong,) = list_wrong(copy)
    assert wrong.startswith("chain: round 0 is not sealed, though it was: ")
    assert ("executions.jsonl is missing" in wrong) == thorough


def test_another_config_is_found_even_if_the_ledger_is_made_again(copy):
    edit_json("config.json", lambda one: one["sampling"].update(temperature=0.5))(copy)
    hash_again(copy)
    assert any("round 1 had another config" in line for line in list_wrong(copy))


def test_the_twenty_kinds_are_more_than_twenty():
    assert len(TAMPERING) >= 30
    assert Config().verify.derive


# --------------------------------------------------------------------------- made again


def derive(program, workdir: Path, *overrides: str) -> list[dict]:
    """Return what a verification finds that makes results again, as the run was executed."""
    arguments = [f"--config={workdir / 'config.json'}", "--config.mode=verify"]
    arguments += [f"--config.verify.{one}" for one in ("samples=-1", "steps=-1", *overrides)]
    code, out, errors = program.run_with(arguments, workdir)
    found = json.loads((workdir / "verification.json").read_text())["findings"]
    assert code == any(one["outcome"] == "differs" for one in found), (out, errors)
    return found


def test_all_of_a_run_comes_out_again_from_its_sft_checkpoint(program, copy):
    """Without the checkpoint of round 1 its policy is trained again."""
    shutil.rmtree(copy / "checkpoints" / sorted((copy / "checkpoints").iterdir())[0].name)
    found = derive(program, copy, "replay=true")
    made = [one for one in found if one["place"].startswith("round") and one["check"] != "files"]
    assert {one["outcome"] for one in made if one["check"] != "checkpoints"} == {"passed"}
    amounts = {(one["place"], one["check"], one["unit"]): one["checked"] for one in made}
    for place in ("round 1", "round 2"):
        assert amounts[place, "samples", "samples"] == 18
        assert amounts[place, "rewards", "samples"] == 18
        assert amounts[place, "steps", "steps"] == 3
        assert amounts[place, "held-out samples", "samples"] == 12
        assert amounts[place, "execution", "stages"] == 5
    (final,) = [one for one in found if one["check"] == "final"]
    assert (final["outcome"], final["unit"]) == ("passed", "files")
    states = [one["outcome"] for one in made if one["unit"] == "states"]
    assert states == ["not checked", "passed"]


def swap_pair(row: dict) -> None:
    for name in [name for name in row if name.endswith("_A")]:
        other = f"{name[:-2]}_B"
        row[name], row[other] = row[other], row[name]


def scale_weights(workdir: Path) -> None:
    """Put other weights into the last checkpoint, with a record that fits them."""
    folder = sorted((workdir / "checkpoints").iterdir())[-1]
    known, other = read_checkpoints(folder.parent), open_checkpoints(workdir / "other", keep=1)
    template = arrays._make_template(saved.read_record(folder / "round" / "metadata").arrays)
    state, position = known.restore(template, int(folder.name))
    state["params"] = jax.tree.map(lambda leaf: leaf * np.float32(1.01), state["params"])
    save_id = other.save(position.pop("step"), state, position)
    other.close()
    known.close()
    shutil.rmtree(folder)
    (workdir / "other" / f"{save_id:08d}").rename(folder)


def other_answer(row: dict) -> None:
    row |= {"output": "", "response_ids": row["response_ids"][-1:], "sum_logps": row["logps"][-1]}
    row["logps"] = row["logps"][-1:]


def find_cut(workdir: Path, name: str) -> int:
    """Return the index of an answer of several tokens that ended by itself."""
    rows = map(json.loads, (workdir / name).read_text().splitlines())
    return next(
        at
        for at, row in enumerate(rows)
        if row["finish_reason"] == "stop" and len(row["response_ids"]) > 1
    )


def test_making_results_again_finds_what_fits_its_hashes(program, copy):
    samples, eval = "rounds/0002/samples.jsonl", "rounds/0001/eval.jsonl"
    rows = list(map(json.loads, (copy / "metrics.jsonl").read_text().splitlines()))
    step = next(at for at, row in enumerate(rows) if row["step"] == 5 and "loss/train" in row)
    edit_row("rounds/0001/feedback.jsonl", swap_pair)(copy)
    edit_row(eval, {"reward": 7.0})(copy)
    edit_row(samples, other_answer, find_cut(copy, samples))(copy)
    edit_row("metrics.jsonl", {"loss/train": rows[step]["loss/train"] + 1e-6}, step)(copy)
    scale_weights(copy)
    hash_again(copy)
    seal_again(copy)
    found = derive(program, copy)
    wrong = {(one["place"], one["check"]) for one in found if one["outcome"] == "differs"}
    assert ("round 1", "files") not in wrong
    assert wrong >= {
        ("round 1", "feedback"),
        ("round 1", "held-out"),
        ("round 2", "samples"),
        ("round 2", "rewards"),
        ("round 2", "steps"),
        ("round 2", "checkpoints"),
        ("round 2", "held-out samples"),
    }
    untouched = {("round 1", name) for name in ("samples", "rewards")}
    assert not wrong & (untouched | {("round 0", "held-out"), ("round 0", "held-out samples")})


def rename_device(plain: dict) -> None:
    for record in plain["executions"].values():
        record["device"] = "another device"


def nudge(workdir: Path, name: str) -> None:
    """Have log-probabilities differ as by rounding."""
    rows = list(map(json.loads, (workdir / name).read_text().splitlines()))
    for row in rows:
        row["logps"] = [value + 1e-6 for value in row["logps"]]
        row["sum_logps"] = math.fsum(row["logps"])
    (workdir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_on_another_device_samples_are_re_scored(program, copy):
    eval = "rounds/0002/eval.jsonl"
    for folder in sorted((copy / "rounds").iterdir()):
        edit_json(f"rounds/{folder.name}/manifest.json", rename_device)(copy)
    nudge(copy, eval)

    def draw() -> dict:
        hash_again(copy)
        seal_again(copy)
        hash_again(copy)
        found = derive(program, copy, "round=2", "steps=0")
        (execution,) = [one for one in found if one["check"] == "execution"]
        assert "something else (device)" in execution["why"]
        return [one for one in found if one["check"] == "held-out samples"][-1]

    found = draw()
    assert (found["outcome"], found["checked"]) == ("passed", 12)
    assert found["why"].startswith("0 are the same to the last bit, 0 have other tokens; a token's")
    assert found["why"].endswith("allowed: 0.0001 and 0.01")
    edit_row(eval, other_answer, find_cut(copy, eval))(copy)
    found = draw()
    assert found["outcome"] == "differs" and "the largest is in sample" in found["why"]
