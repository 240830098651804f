"""mode=verify on a finished run: as it was written, and after it was tampered with.

Every kind of tampering is tried on a copy of one run, once by somebody who edits a file and no
more, and some of them by somebody who makes hashes again. Only hashes are compared here.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halos_jax.audit import run as audit
from halos_jax.cli.presets import load_preset
from halos_jax.config import Config, VerifyConfig, freeze
from halos_jax.storage import hash_file
from halos_jax.workdir import ledger
from halos_jax.workdir.manifests import FileRecord, load_manifest, save_manifest
from halos_jax.workdir.seals import certificate, chain
from tests.e2e.test_tampering import stop_run

RULES = Path(__file__).with_name("watched_rules.py")
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


# --------------------------------------------------------------------------- tampering


def edit_row(name: str, change: dict | Callable[[dict], None], index: int = 0):
    """Return a function that changes one record of a file."""

    def edit(workdir: Path) -> None:
        path = workdir / name
        lines = path.read_text().splitlines()
        row = json.loads(lines[index])
        if isinstance(change, dict):
            assert change.keys() <= row.keys()
            row |= change
        else:
            change(row)
        assert row != json.loads(lines[index]), name
        lines[index] = json.dumps(row)
        path.write_text("".join(f"{line}\n" for line in lines))

    return edit


def edit_lines(name: str, change: Callable[[list], None]):
    def edit(workdir: Path) -> None:
        path = workdir / name
        lines = path.read_text().splitlines(keepends=True)
        change(lines)
        path.write_text("".join(lines))

    return edit


def edit_json(name: str, change: Callable[[dict], None]):
    def edit(workdir: Path) -> None:
        plain = json.loads((workdir / name).read_text())
        change(plain)
        (workdir / name).write_text(json.dumps(plain, indent=2) + "\n")

    return edit


def flip(name: str):
    """Return a function that flips a bit in the largest file that a pattern matches."""

    def edit(workdir: Path) -> None:
        files = [path for path in workdir.glob(name) if path.is_file()]
        path = max(files, key=lambda one: one.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return edit


def swap(one: str, other: str):
    """Return a function that gives each of two files or folders the other's name."""

    def edit(workdir: Path) -> None:
        paths = [workdir / one, workdir / other]
        aside = workdir / "aside"
        paths[0].rename(aside)
        paths[1].rename(paths[0])
        aside.rename(paths[1])

    return edit


def remove(name: str):
    def edit(workdir: Path) -> None:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return edit


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def swap_checkpoints(workdir: Path) -> None:
    """Put the checkpoint at the end of round 1 in the place of that of round 2."""
    first, *_, last = sorted((workdir / "checkpoints").iterdir())
    shutil.rmtree(last)
    shutil.copytree(first, last)


def swap_pair(row: dict) -> None:
    row["output_A"], row["output_B"] = row["output_B"], row["output_A"]


def change_input(name: str, change: Callable[[bytes], bytes]):
    """Return a function that changes an input of the run, which is put back by `inputs_kept`."""

    def edit(workdir: Path) -> None:
        path = (
            Path(json.loads((workdir / "config.json").read_text())["data"]["train"]).parent / name
        )
        before = path.read_bytes()
        assert change(before) != before
        path.write_bytes(change(before))

    return edit


def change_rules(workdir: Path) -> None:
    path = workdir.parent / "code" / RULES.name
    path.write_text(path.read_text().replace("-0.01", "-0.02"))


SAMPLES, SCORES, PAIRS = (f"rounds/0001/{name}.jsonl" for name in ("samples", "scores", "feedback"))
FIRST, SECOND = (f"rounds/000{round}/manifest.json" for round in (1, 2))
TAMPERING = {
    "the text of a sample": (edit_row(SAMPLES, {"output": "x"}), "samples.jsonl"),
    "the tokens of a sample": (edit_row(SAMPLES, {"response_ids": [9, 9, 4]}), "samples.jsonl"),
    "the log-probability of a sample": (edit_row(SAMPLES, {"sum_logps": -0.1}), "samples.jsonl"),
    "the log-probabilities of tokens": (edit_row(SAMPLES, {"logps": [-0.1]}), "samples.jsonl"),
    "a sample is dropped": (edit_lines(SAMPLES, lambda lines: lines.pop()), "samples.jsonl"),
    "samples change places": (edit_lines(SAMPLES, list.reverse), "samples.jsonl"),
    "a score": (edit_row(SCORES, {"reward": 9.5}), "scores.jsonl"),
    "the label of a pair": (edit_row(PAIRS, {"label": 0}), "feedback.jsonl"),
    "chosen and rejected": (edit_row(PAIRS, swap_pair), "feedback.jsonl"),
    "a pair is dropped": (edit_lines(PAIRS, lambda lines: lines.pop(0)), "feedback.jsonl"),
    "a held-out score": (edit_row("rounds/0002/eval.jsonl", {"reward": 9.5}), "eval.jsonl"),
    "a metric of a step": (edit_row("metrics.jsonl", {"loss/train": 0.1}, 4), "metrics.jsonl"),
    "a row of metrics is removed": (
        edit_lines("metrics.jsonl", lambda lines: lines.pop(3)),
        "metrics.jsonl",
    ),
    "a metric of a round": (
        edit_json(SECOND, lambda one: one["metrics"].update(reward_eval=9.0)),
        "round 2: its digest is not that of its content",
    ),
    "a decision": (
        edit_json(SECOND, lambda one: one["decisions"]["best"].update(round=7)),
        "round 2: its digest is not that of its content",
    ),
    "what a stage was executed on": (
        edit_json(FIRST, lambda one: one["executed"].update(sample=[])),
        "round 1: its digest is not that of its content",
    ),
    "prompts are skipped": (
        edit_json(FIRST, lambda one: one.update(start=1)),
        "round 1 begins at prompt 1, not 0",
    ),
    "a byte of a checkpoint": (flip("checkpoints/*/state/**/d/*"), "checkpoints: 0000"),
    "a checkpoint of another round": (swap_checkpoints, "its record is not the one"),
    "the record of a checkpoint": (flip("checkpoints/*/round/metadata"), "checkpoints: 0000"),
    "a round is removed": (remove("rounds/0001"), "round 1 is missing"),
    "the last round is removed": (remove("rounds/0002"), "0002/manifest.json is missing"),
    "rounds change places": (swap("rounds/0001", "rounds/0002"), "0001/manifest.json is the m"),
    "manifests change places": (swap(FIRST, SECOND), "0001/manifest.json has"),
    "the config": (
        edit_json("config.json", lambda one: one["sampling"].update(temperature=0.5)),
        "round 1 had another config",
    ),
    "the record of inputs": (
        edit_json("inputs.json", lambda one: one.pop("data.train")),
        "data.train is not what round 2 was made with",
    ),
    "the order of prompts": (flip("prompts.json"), "prompts.json has"),
    "a line of the ledger": (flip("ledger.jsonl"), "ledger.jsonl:"),
    "the end of the ledger": (
        edit_lines("ledger.jsonl", lambda lines: lines.__delitem__(slice(20, None))),
        "of another run, or newer than the run's ledger",
    ),
    "the ledger is removed": (remove("ledger.jsonl"), "ledger.jsonl is missing"),
    "the weights in final/": (
        flip("final/model.safetensors"),
        "weights is not that of the workdir",
    ),
    "a file of final/": (
        edit_json("final/config.json", lambda one: one.update(rope_theta=9.0)),
        "final/config.json is damaged",
    ),
    "a field of the certificate": (
        edit_json("final/certificate.json", lambda one: one.update(task="align")),
        "certificate: it was edited",
    ),
    "the data": (
        change_input("prompts.jsonl", lambda data: data.replace(b"a", b"b", 1)),
        "inputs: data.train",
    ),
    "other weights under the same name": (
        change_input("policy/model.safetensors", flip_last),
        "inputs: model.path",
    ),
    "another reward model under the same name": (
        change_input("reward/model.safetensors", flip_last),
        "inputs: reward.path",
    ),
    "the code of a reward": (change_rules, "inputs: reward.rules"),
}


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
