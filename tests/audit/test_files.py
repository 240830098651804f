"""The hashes of a workdir."""

import dataclasses

import pytest

from halos_jax.audit import files
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import save_manifest


def outcomes(findings) -> list[tuple[str, str]]:
    return [(one.outcome, one.why) for one in findings]


def check_all(opened) -> list[str]:
    """Return what differs."""
    found = [*files.check_records(opened), *files.check_ledger(opened)]
    for manifest in opened.manifests:
        found += files.check_files(opened, manifest)
    return [one.why for one in found if one.outcome == "differs"]


def test_a_run_as_it_was_written_passes(made):
    opened = made.open()
    assert check_all(opened) == []
    assert [one.checked for one in files.check_ledger(opened)] == [20, 7]
    assert [one.checked for one in files.check_files(opened, opened.manifests[1])] == [5]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("rounds/0001/score.jsonl", ("1", "7"), "score.jsonl has sha256"),
        ("rounds/0002/manifest.json", ('"seed": 0', '"seed": 1'), "0002/manifest.json has sha256"),
        ("config.json", ('"seed": 0', '"seed": 1'), "config.json has sha256"),
        ("final/config.json", ("{}", "[]"), "final/config.json is damaged"),
        ("ledger.jsonl", ('"gone"', '"path"'), ""),
    ],
)
def test_a_file_that_was_changed_is_named(made, name, change, said):
    if said:
        made.edit(name, lambda text: text.replace(*change))
    else:
        made.edit(name, lambda text: "".join(text.splitlines(keepends=True)[1:]))
        said = "ledger.jsonl:1: not as the run wrote it"
    assert said in " ".join(check_all(made.open()))


def test_a_file_that_a_run_writes_meanwhile_is_compared_with_the_newest_line(made):
    opened = made.open()
    changed = dataclasses.replace(opened.manifests[2], seed=9)
    save_manifest(opened.folder(changed), changed, open_ledger(made.workdir))
    assert check_all(opened) == []
    made.edit("rounds/0002/manifest.json", lambda text: text + "\n")
    assert "0002/manifest.json has" in " ".join(check_all(opened))


def test_a_line_of_the_ledger_may_be_about_a_file_that_is_not_renamed_yet(made):
    ledger = open_ledger(made.workdir)
    ledger.note_file(made.workdir / "rounds" / "0002" / "manifest.json", 7, "00")
    assert check_all(made.open()) == []
    ledger.note_file(made.workdir / "new.json", 7, "00")
    assert "0002/manifest.json has" in " ".join(check_all(made.open())), "it was not acted on"


def test_a_ledger_that_is_gone_differs_but_for_an_old_run(made):
    (made.workdir / "ledger.jsonl").unlink()
    assert "ledger.jsonl is missing" in check_all(made.open())[0]
    for round in range(3):
        name = f"rounds/{round:04d}/manifest.json"
        made.edit_json(name, lambda plain: plain.update(version=1))
    (finding,) = files.check_ledger(made.open())
    assert (finding.outcome, "version that kept none" in finding.why) == ("not checked", True)


def test_the_rest_of_a_run_under_way_is_not_checked(made):
    (made.workdir / "final").rename(made.workdir / "elsewhere")
    made.edit_json("rounds/0002/manifest.json", lambda plain: plain.update(stages=["sample"]))
    _, rest = files.check_records(made.open())
    assert rest.outcome == "not checked"
    assert rest.why.startswith("round 2 is under way, or was stopped: score, feedback, train, ev")
