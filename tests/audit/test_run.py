"""mode=verify: the table, the file, the exit code."""

import dataclasses
import json
import re

import pytest

from halos_jax.audit import run
from halos_jax.audit.findings import passed
from halos_jax.audit.table import Check
from halos_jax.config import ConfigError, PipelineConfig
from halos_jax.storage import WorkdirError


def test_a_run_as_it_was_written_is_verified(made, capsys):
    before = {path: path.read_bytes() for path in made.workdir.rglob("*") if path.is_file()}
    run.run_verify(made.config)
    out = re.sub(r"(?m)^\d\d:\d\d:\d\d .*\n", "", capsys.readouterr().out)  # a log of other tests
    told, left, place = out.split("\n\n")
    record = json.loads((made.workdir / "verification.json").read_text())
    assert record["counts"]["differs"] == 0
    assert len(record["findings"]) == sum(record["counts"].values())
    # A line for each check, and the table of what was not checked; all of it is in the file.
    names = [line.split()[0] for line in told.splitlines()]
    assert names == list(dict.fromkeys(one["check"] for one in record["findings"]))
    assert " passed " not in left and place == f"every check: {made.workdir}/verification.json\n"
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert changed == ["certificate.json"]


def test_a_difference_is_an_error_with_exit_code_1(made, tmp_path):
    made.edit("rounds/0001/score.jsonl", lambda text: text.replace("1", "7"))
    output = str(tmp_path / "found.json")
    verify = dataclasses.replace(made.config.verify, output=output)
    with pytest.raises(run.VerificationError, match="round 1, files: score") as caught:
        run.run_verify(dataclasses.replace(made.config, verify=verify))
    assert caught.value.exit_code == 1
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["counts"]["differs"] == 1
    assert not (made.workdir / "verification.json").exists()


def raise_user_error(opened, manifest):
    raise WorkdirError("damaged")


def raise_config_error(opened):
    raise ConfigError("model.path: is not there")


def find_round(opened, manifest):
    yield passed("made", "up", manifest.round, unit="things")


def test_errors_of_a_check_are_findings_and_derived_rounds_are_chosen(made, monkeypatch):
    here = __name__
    checks = (
        Check("a", f"{here}:raise_config_error"),
        Check("b", f"{here}:raise_user_error", per="manifest", derives=True),
        Check("c", f"{here}:find_round", per="manifest"),
        Check("d", f"{here}:find_round", per="manifest", tasks=("sft",)),
    )
    monkeypatch.setattr(run, "CHECKS", checks)
    found = [(one.place, one.outcome, one.why) for one in run.verify_opened(made.open(round=2))]
    assert found[:-1] == [
        ("online", "not checked", "model.path: is not there"),
        ("round 2", "differs", "damaged"),
        ("round 0", "passed", ""),
        ("round 1", "passed", ""),
        ("round 2", "passed", ""),
    ]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_task_of_a_pipeline_without_records_is_not_checked(made, tmp_path, is_there):
    """It has not begun, or it is one, such as toy_data, that keeps none."""
    override = {"online": {"workdir": made.config.workdir}, "sft": {"workdir": str(tmp_path / "a")}}
    if is_there:
        (tmp_path / "a").mkdir()
    pipeline = PipelineConfig(tasks=("sft", "online"), overrides=override)
    config = dataclasses.replace(made.config, task="pipeline", pipeline=pipeline)
    found = list(run.verify(config))
    assert (found[0].place, found[0].outcome) == ("sft", "not checked")
    assert "differs" not in {one.outcome for one in found[1:]}


def test_hashes_alone_may_be_asked_for(made, monkeypatch):
    checks = (Check("b", f"{__name__}:raise_user_error", per="manifest", derives=True),)
    monkeypatch.setattr(run, "CHECKS", checks)
    finding, *_ = run.verify_opened(made.open(derive=False))
    assert (finding.outcome, finding.why) == (
        "not checked",
        "only hashes were asked for (verify.derive)",
    )
