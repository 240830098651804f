"""The chain of manifests, and what they have the hashes of."""

import dataclasses
import json
import shutil

import pytest

from halos_jax.audit import links
from halos_jax.config import SamplingConfig
from halos_jax.workdir.manifests import load_manifest, save_manifest
from halos_jax.workdir.seals import chain, defaults


def check_all(opened) -> list[str]:
    """Return what differs."""
    found = [*links.check_chain(opened), *links.check_given(opened)]
    return [one.why for one in found if one.outcome == "differs"]


def test_a_run_as_it_was_written_passes(made):
    found = list(links.check_chain(made.open()))
    assert {one.outcome for one in found} == {"passed"}
    assert [(one.check, one.amount) for one in found] == [
        ("chain", "3 manifests"),
        ("chain", "3 manifests"),
        ("chain", "1 inputs"),
        ("metrics", "6 rows"),
    ]
    assert check_all(made.open()) == []


def edit_manifest(made, place, **fields):
    """Rewrite a manifest as its editor would who does not know of its seal."""
    folder = made.workdir / "rounds" / f"{place:04d}"
    save_manifest(folder, dataclasses.replace(load_manifest(folder), **fields))


def seal_again(made, round, **fields):
    """Rewrite a manifest as its editor would who makes its seal again."""
    folder = made.workdir / "rounds" / f"{round:04d}"
    before = load_manifest(folder)
    facts = {key: one for key, one in before.chain.items() if key not in ("previous", "digest")}
    edited = dataclasses.replace(before, **fields, chain={})
    save_manifest(folder, chain.seal(edited, before.chain["previous"], facts))


def test_a_manifest_that_was_edited_is_named(made):
    edit_manifest(made, 1, seed=5)
    assert check_all(made.open()) == ["round 1: its digest is not that of its content"]


def test_a_seal_that_was_made_again_is_found_at_the_round_after_it(made):
    seal_again(made, 1, seed=5)
    (line,) = check_all(made.open())
    assert line.startswith("round 2: it follows ")


def test_a_seal_that_was_taken_off_is_missed(made):
    edit_manifest(made, 1, chain={})
    assert "round 1 is not sealed, though the one before it is" in check_all(made.open())[0]


def test_a_round_that_is_gone_or_moved_is_named(made):
    rounds = made.workdir / "rounds"
    shutil.move(rounds / "0001", made.workdir / "aside")
    assert "round 1 is missing" in check_all(made.open())[0]
    shutil.move(rounds / "0002", rounds / "0001")
    edit_manifest(made, 1, round=1)
    found = check_all(made.open())[0]
    assert "round 1 begins at prompt 4, not 0" in found
    assert "round 1 samples from 'round-0001', not 'sft'" in found


def test_prompts_that_were_skipped_are_named(made):
    seal_again(made, 2, start=6)
    assert check_all(made.open()) == ["round 2 begins at prompt 6, not 4"]


def test_another_config_is_found(made):
    made.edit_json("config.json", lambda plain: plain["sampling"].update(temperature=0.5))
    found = check_all(made.open())
    assert found[0].startswith("round 0 had another config; round 1 had another config")
    assert found[1] == "sampling.temperature: 0.5 -> 0.7"


@pytest.mark.parametrize("version", ["before exact ratios", "before auto"])
def test_the_config_of_a_run_begun_before_auto_is_the_same_commands(made, version):
    def change(plain):
        plain["sampling"]["exact_ratios"] = False
        if version == "before exact ratios":
            del plain["sampling"]["exact_ratios"]

    made.edit_json("config.json", change)
    opened = made.open()
    assert opened.config.sampling.exact_ratios is False
    assert [one.outcome for one in links.check_given(opened)] == ["passed"]


def test_a_change_that_the_run_has_noted_is_none(made):
    segment = {"round": 3, "step": 6, "changed": {"optimizer.learning_rate": [2e-6, 1e-6]}}

    def change(plain):
        plain["optimizer"]["learning_rate"] = 1e-6
        plain["segments"] = [segment]

    made.edit_json("config.json", change)
    assert check_all(made.open()) == []


def test_rows_of_metrics_are_compared(made):
    made.edit("metrics.jsonl", lambda text: text.replace("0.5", "0.6"))
    assert check_all(made.open()) == ["round 1 has other values"]
    made.edit("metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[1:]))
    assert check_all(made.open()) == ["round 1 has 2 rows, expected 3"]
    (made.workdir / "metrics.jsonl").unlink()
    *_, gone = links.check_chain(made.open())
    assert gone.outcome == "not checked" and "has none of round 1, round 2" in gone.why


def test_another_data_file_in_the_record_of_inputs_is_found(made):
    made.edit_json("inputs.json", lambda plain: plain["data.train"][0].update(whole="00"))
    assert check_all(made.open()) == ["data.train is not what round 2 was made with"]


@pytest.mark.parametrize(("round", "outcome"), [(3, "passed"), (2, "differs")])
def test_data_may_have_grown_after_the_newest_round(made, round, outcome):
    segment = {"round": round, "step": 6, "changed": {"data.train": ["8 prompts", "9 prompts"]}}
    made.edit_json("inputs.json", lambda plain: plain["data.train"][0].update(whole="00"))
    made.edit_json("config.json", lambda plain: plain.update(segments=[segment]))
    finding = next(one for one in links.check_chain(made.open()) if "inputs" in one.what)
    assert finding.outcome == outcome
    assert ("data.train changed after round 2" in finding.why) == (outcome == "passed")


@pytest.mark.parametrize("last", [2, 3])
@pytest.mark.parametrize(
    ("field", "outcome"), [("reward.function", "passed"), ("model.path", "differs")]
)
def test_code_may_change_between_rounds_and_a_model_may_not(made, field, outcome, last):
    made.edit_json("inputs.json", lambda plain: plain.update({field: []}))
    before = None
    for round in range(3):
        folder = made.workdir / "rounds" / f"{round:04d}"
        manifest = load_manifest(folder)
        inputs = chain.hash_inputs(made.workdir) | ({field: "before"} if round < last else {})
        facts = {**manifest.chain, "inputs": inputs}
        facts = {key: one for key, one in facts.items() if key not in ("previous", "digest")}
        unsealed = dataclasses.replace(manifest, chain={})
        before = chain.seal(unsealed, chain.find_digest(before), facts)
        save_manifest(folder, before)
    finding = next(one for one in links.check_chain(made.open()) if "inputs" in one.what)
    said = f"{field} changed {'before' if last == 2 else 'after'} round 2"
    if (last, outcome) == (3, "differs"):
        said = f"{field} is not what round 2 was made with"
    assert finding.outcome == outcome and said in finding.why


def test_a_run_of_an_earlier_version_is_not_checked(made):
    for round in range(3):
        unseal(made, round)
    made.edit_json("config.json", lambda plain: plain.pop("verify"))
    (finding,) = links.check_chain(made.open())
    assert (finding.outcome, finding.total) == ("not checked", 3)


@pytest.mark.parametrize("edited", [False, True])
def test_seals_that_were_taken_off_all_manifests_are_missed(made, edited):
    for round in range(3):
        edit_manifest(made, round, chain={})
    if edited:  # by somebody who knows what a version without seals did not write
        for round in range(3):
            unseal(made, round)
    (finding,) = links.check_chain(made.open())
    assert (finding.outcome, finding.checked, finding.total) == ("differs", 0, 3)
    assert finding.why.startswith("round 0 is not sealed, though it was: ")


def test_only_what_an_earlier_version_completed_has_no_seal(made):
    """A later version has carried the run on from round 2, and then its seal was taken off."""
    for round in range(3):
        unseal(made, round)
    made.edit_json("config.json", lambda plain: plain.update(progress=False))
    start = {"round": 2, "stage": "sample", "execution": {}}
    (made.workdir / "executions.jsonl").write_text(json.dumps(start) + "\n")
    wrong, left = links.check_chain(made.open())
    assert wrong.outcome == "differs" and wrong.why.startswith("round 2 is not sealed, though")
    assert (left.outcome, left.total) == ("not checked", 2)


def unseal(made, round):
    """Rewrite a manifest as a version before seals wrote it."""

    def change(plain):
        for name in ("executed", "executions", "sampled_by", "trained", "chain"):
            del plain[name]

    made.edit_json(f"rounds/{round:04d}/manifest.json", change)


def test_another_config_of_the_command_is_found(made):
    given = dataclasses.replace(made.config, sampling=SamplingConfig(temperature=0.1))
    opened = dataclasses.replace(made.open(), given=given)
    assert check_all(opened) == ["sampling.temperature: 0.7 -> 0.1"]
    given = dataclasses.replace(made.config, progress=False)
    assert check_all(dataclasses.replace(made.open(), given=given)) == []


@pytest.fixture
def older(made):
    """Return a run whose version had 0.5 as the default of the temperature, and no top_k."""
    then = defaults.list_defaults(made.config) | {"sampling.temperature": 0.5}
    del then["sampling.top_k"]
    start = {"round": 0, "stage": "evaluate", "execution": {}, "defaults": then}
    (made.workdir / "executions.jsonl").write_text(json.dumps(start) + "\n")
    made.edit_json("config.json", lambda plain: plain["sampling"].update(temperature=0.5))
    made.edit_json("config.json", lambda plain: plain["sampling"].pop("top_k"))
    history, before = made.open().history, None
    for round in range(3):
        folder = made.workdir / "rounds" / f"{round:04d}"
        manifest = load_manifest(folder)
        config = chain.hash_config(history, round, then)
        facts = {**manifest.chain, "config": config, "defaults": defaults.name_defaults(then)}
        facts = {key: one for key, one in facts.items() if key not in ("previous", "digest")}
        unsealed = dataclasses.replace(manifest, chain={})
        before = chain.seal(unsealed, chain.find_digest(before), facts)
        save_manifest(folder, before)
    return made


def test_a_default_that_a_later_version_has_changed_is_no_other_config(older):
    assert check_all(older.open()) == []
    *_, given = links.check_given(older.open())
    assert (
        given.why
        == "other defaults than when the run was started: sampling.temperature: 0.5 -> 0.7"
    )
    older.edit_json("config.json", lambda plain: plain["sampling"].update(temperature=0.6))
    assert check_all(older.open())[0].startswith("round 0 had another config; round 1 had")
    older.edit_json("config.json", lambda plain: plain["sampling"].update(temperature=0.5))
    (older.workdir / "executions.jsonl").unlink()
    assert check_all(older.open())[0].startswith(
        "executions.jsonl has not the defaults that round 0 had; "
    )


def test_another_value_of_the_command_is_one_whatever_the_defaults(older):
    given = dataclasses.replace(older.config, sampling=SamplingConfig(temperature=0.1))
    opened = dataclasses.replace(older.open(), given=given)
    assert check_all(opened) == ["sampling.temperature: 0.5 -> 0.1"]
