"""The study of colabs/gsm8k_study: its runs, the runner, the records and the tables."""

import dataclasses
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import load_preset
from halos_jax.config import freeze
from halos_jax.rounds.order import start_order
from halos_jax.signs.intervals import Estimate

STUDY = Path(__file__).parents[2] / "colabs" / "gsm8k_study"
sys.path.insert(0, str(STUDY))

import collect  # noqa: E402
import curves  # noqa: E402
import hold_out  # noqa: E402
import plan  # noqa: E402
import preset  # noqa: E402
import run  # noqa: E402
import run_tables  # noqa: E402
import sign_tables  # noqa: E402
from plan import Run, Step  # noqa: E402

# --------------------------------------------------------------------------- the runs


@pytest.fixture
def settings(tmp_path):
    """Return settings with two runs at a time on one GPU."""
    folder, results = tmp_path / "folder", tmp_path / "results"
    arguments = ["A", f"--folder={folder}", f"--runs={tmp_path}/a,{tmp_path}/b", "--per_gpu=2"]
    _, found = run.parse([*arguments, f"--results={results}", f"--pack={tmp_path}/pack.tar.gz"])
    return found


@pytest.mark.parametrize("step", [step for one in plan.list_runs() for step in one.steps])
def test_every_step_is_a_config_that_can_run(step, settings, tmp_path):
    command = run.make_command(step, settings, tmp_path / step.name)
    flags, overrides = split_overrides(command[3:])
    config = load_preset(flags[0].removeprefix("--config="))
    frozen = freeze(config, errors=apply_overrides(config, overrides))
    data = frozen.data
    assert data.holdout == (0 if frozen.task == "eval" else plan_holdout())
    assert (frozen.sampling.max_tokens, frozen.sampling.top_p) in ((320, 1.0), (512, 1.0))
    if frozen.task == "online" and step.preset.startswith(plan.PRESET):
        assert frozen.rounds.total_prompts == plan.PROMPTS and frozen.eval.test_temperature == 0


def plan_holdout() -> int:
    return load_preset(f"{STUDY / 'preset.py'}:DIR").data.holdout


def test_the_runs_are_those_of_the_questions():
    names = [one.name for one in plan.choose_runs(["A"])]
    rates, shapes = ("1e-6", "2e-6", "5e-6"), ("16x128", "4x512", "offline")
    every = {f"dpo-{shape}-{rate}-s0" for shape in shapes for rate in rates}
    assert set(names) == every | {"dpo-16x128-3e-6-s0"} and len(names) == 10
    assert names[0].startswith("dpo-16x128") and names[-1].startswith(
        "dpo-offline"
    )  # longest first
    first = plan.choose_runs(["dpo-offline-5e-6-s0", "A"])
    assert first[0].name == "dpo-offline-5e-6-s0" and len(first) == 10
    seeds = {one.name[-1] for one in plan.choose_runs(["A", "B"]) if "16x128-3e-6" in one.name}
    assert seeds == {"0", "1", "2"}
    for one in plan.choose_runs(["A", "B", "B2", "E"]):
        (step,) = one.steps
        assert int(step.fields["rounds.prompts_per_round"]) == plan.SHAPES[one.name.split("-")[1]]
    with pytest.raises(ValueError, match=r"got Z; allowed: a batch \(A, B"):
        plan.choose_runs(["A", "Z"])


def test_the_last_round_is_the_newest_checkpoint(settings, tmp_path):
    for name in ("00000004", "00000016"):
        (tmp_path / "a" / "preset-s0" / "checkpoints" / name).mkdir(parents=True)
    steps = {step.name: step for one in plan.choose_runs(["F"]) for step in one.steps}
    command = run.make_command(steps["preset-s0-last"], settings, tmp_path / "a" / "preset-s0-last")
    assert "--config.model.checkpoint=16" in command
    assert f"--config.model.path={tmp_path}/a/preset-s0" in command


def test_the_held_out_questions_are_those_of_the_runs(monkeypatch, tmp_path):
    questions = [{"question": f"{number} + 1?", "answer": f"#### {number}"} for number in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    monkeypatch.setattr(preset, "HELD_OUT", 3)
    assert hold_out.write_held_out(tmp_path) == 3
    written = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    trained = start_order(freeze(preset.get_config(str(tmp_path)))).prompts
    asked = [one.turns[-1].content for one in trained]
    assert len(asked) == 6 and all(one in questions for one in written)
    assert {one["question"] for one in written}.isdisjoint(asked)
    kept, all_of_them = ((tmp_path / name).read_text() for name in ("rest.jsonl", "train.jsonl"))
    rest = [json.loads(line)["question"] for line in kept.splitlines()]
    assert sorted(rest + [one["question"] for one in written]) == sorted(
        json.loads(line)["question"] for line in all_of_them.splitlines()
    )


def test_slots_are_dealt_out_over_the_gpus():
    places = (Path("x"), Path("y"))
    slots = run.make_slots((2, 1), places)
    assert slots == [
        run.Slot(0, 0.5, Path("x")),
        run.Slot(1, 1.0, Path("y")),
        run.Slot(0, 0.5, Path("x")),
    ]


def test_a_run_gets_the_gpu_with_the_least_work():
    slots = run.make_slots((2, 2), (Path("x"),))
    long, short = (Run(name, "A", seconds, ()) for name, seconds in (("l", 90), ("s", 30)))
    busy = [run.Active(long, slots[0]), run.Active(short, slots[1])]
    assert run.choose_slot(slots[2:], busy, short, is_kept=False) == slots[3]
    assert run.choose_slot(slots[2:3], busy, short, is_kept=False) == slots[2]
    assert run.choose_slot([], busy, short, is_kept=False) is None


def test_whole_gpus_are_kept_for_runs_that_want_one():
    whole, share = run.Slot(0, 1.0, Path("x")), run.Slot(1, 0.25, Path("x"))
    alone, other = Run("a", "F", 9, (), is_alone=True), Run("o", "A", 9, ())
    assert run.choose_slot([whole, share], [], alone, is_kept=True) == whole
    assert run.choose_slot([whole, share], [], other, is_kept=True) == share
    assert run.choose_slot([whole], [], other, is_kept=True) is None
    assert run.choose_slot([whole], [], other, is_kept=False) == whole
    assert run.choose_slot([share], [], alone, is_kept=False) == share


# --------------------------------------------------------------------------- the runner


def use(monkeypatch, programs):
    """Let the steps be Python programs, by name, in place of the program itself."""

    def make(step, settings, workdir):
        return [sys.executable, "-c", programs[step.name], str(workdir)]

    monkeypatch.setattr(run, "make_command", make)


def read_attempts(settings, name):
    return [one["code"] for one in collect.read_json(settings.results / f"{name}.json")["attempts"]]


def make_runs(*names):
    return [Run(name, "A", 1, (Step(name, "", {}),)) for name in names]


def test_a_run_that_fails_is_tried_twice_and_the_others_go_on(monkeypatch, settings, capsys):
    use(monkeypatch, {"good": "print(1)", "bad": "raise SystemExit('no such thing')"})
    assert run.Study(make_runs("bad", "good"), settings).run() == 1
    assert (read_attempts(settings, "good"), read_attempts(settings, "bad")) == ([0], [1, 1])
    assert "no such thing" in capsys.readouterr().out
    with tarfile.open(settings.pack) as archive:
        assert {"good.json", "bad.json", "logs/good.log"} <= set(archive.getnames())


def test_the_limit_cuts_a_run_and_the_same_command_goes_on(monkeypatch, settings):
    slow = (
        "import pathlib, sys, time; mark = pathlib.Path(sys.argv[1], 'mark')\n"
        "if not mark.exists(): mark.touch(); time.sleep(60)"
    )
    use(monkeypatch, {"slow": slow, "next": "pass"})
    runs = [Run("slow", "A", 1, (Step("slow", "", {}), Step("next", "", {})))]
    limited = dataclasses.replace(settings, limit=1.0)
    assert run.Study(runs, limited).run() == 1
    assert read_attempts(settings, "slow") == [None]
    assert run.Study(runs, settings).run() == 0
    assert (read_attempts(settings, "slow"), read_attempts(settings, "next")) == ([None, 0], [0])
    assert run.Study(runs, settings).run() == 0  # nothing is left to do
    assert read_attempts(settings, "next") == [0]


def test_a_line_says_how_a_run_has_ended():
    held_out = [{"right": "0042", "samples": 4}, {"right": "4444", "samples": 4}]
    record = {
        "name": "one",
        "attempts": [{"code": 0, "seconds": 12.4}],
        "rounds": [
            {"round": 0, "held_out": held_out[0], "test": {"right": "01", "samples": 1}},
            {"round": 1, "held_out": held_out[1]},
            {"round": 2, "held_out": held_out[0], "test": {"right": "11", "samples": 1}},
        ],
    }
    assert run.describe(record) == (
        "one: code 0, 12 s, held out 37.5% -> 37.5% in round 2 (best 100.0% in 1), "
        "test 50.0% -> 100.0%"
    )


# --------------------------------------------------------------------------- the records


def test_right_answers_are_counted_by_prompt():
    samples = [
        {"prompt_id": "b", "reward": 1.0, "response_ids": [1, 2], "finish_reason": "stop"},
        {"prompt_id": "a", "reward": 0.0, "response_ids": [1, 2, 3, 4], "finish_reason": "length"},
        {"prompt_id": "b", "reward": 1.0, "response_ids": [1], "finish_reason": "stop"},
        {"prompt_id": "a", "reward": 1.0, "response_ids": [1], "finish_reason": "stop"},
    ]
    counts = collect.count_right(samples)
    assert counts == {"right": "12", "samples": 2, "response_tokens": 2.0, "cut": 0.25}
    assert collect.read_right("0az") == [0, 10, 35]


def test_a_workdir_becomes_a_small_record(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in rows))

    for round in ("0000", "0001", "0002"):
        (tmp_path / "rounds" / round).mkdir(parents=True)
    config = {"task": "online", "model": {"path": "/a/b/model"}, "stop": ["/a/c"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    metrics = {"kl_sampled": 1.23456789, "reward_eval": 0.5}
    for number, files in ((0, {"eval.jsonl": 1, "test.jsonl": 1}), (1, {})):
        manifest = {"round": number, "stages": ["evaluate"], "metrics": metrics, "files": files}
        (tmp_path / "rounds" / f"{number:04d}" / "manifest.json").write_text(json.dumps(manifest))
    for name in ("eval", "test"):
        write(f"rounds/0000/{name}.jsonl", [{"prompt_id": "a", "reward": 1.0}])
    write("metrics.jsonl", [{"step": 1, "loss/train": 0.6931471, "other": 1}, {"round": 0}])
    write("timings.jsonl", [{"round": 0, "stage": "evaluate", "start": 1.0, "end": 3.5}])
    record = collect.collect_run(tmp_path)
    assert record["config"] == {"task": "online", "model": {"path": "model"}, "stop": ["c"]}
    assert not record["is_complete"]
    first, second = record["rounds"]  # nothing of round 2 was committed
    assert first["metrics"]["kl_sampled"] == 1.2346 and first["test"]["right"] == "1"
    assert "held_out" in first and "held_out" not in second
    assert record["steps"] == {"step": [1], "loss/train": [0.69315]}
    assert record["times"] == [[0, "evaluate", 2.5]]


# --------------------------------------------------------------------------- the tables


def make_result(*rights, signs=(), complete=True, samples=4):
    """Return the record of a run whose rounds have these counts of right samples."""
    rounds = [
        {
            "round": number,
            "stop": number,
            "metrics": {},
            "held_out": {"right": right, "samples": samples},
        }
        for number, right in enumerate(rights)
    ]
    for one, sign in zip(rounds, signs):
        one["metrics"] = {"fresh_margin": sign}
    attempts = [{"seconds": 10.0, "code": 0, "share": 0.25}]
    return {
        "config": {"rounds": {"total_prompts": len(rights) - (1 if complete else 0)}},
        "rounds": rounds,
        "is_complete": complete,
        "steps": {"step": [1, 2]},
        "times": [[2, "train", 3.0], [3, "train", 5.0]],
        "attempts": attempts,
    }


def test_a_curve_has_the_shares_of_each_question():
    curve = curves.read_curve(make_result("0424", "4440", "4400"))
    assert curve[0].shares.tolist() == [0, 1, 0.5, 1]
    assert curves.find_best(curve).round == 1
    # Shares 0, 1, .5, 1: mean .625, variance between questions .2292, standard error .2394.
    estimate = curve[0].estimate
    assert estimate.value == 0.625 and estimate.error == pytest.approx(0.2394, abs=1e-4)


def test_rates_are_tabled_with_their_seeds():
    results = {
        "dpo-16x128-2e-6-s0": make_result("00", "40"),
        "dpo-16x128-2e-6-s1": make_result("00", "44", "00"),
        "dpo-offline-2e-6-s0": make_result("00", "20", complete=False),
        "guard-16x128-2e-6-s0": make_result("00", "44"),
    }
    assert run_tables.table_rates(results)[1] == ["2e-6", "", "", "25.0 (50.0, 0.0)", ""]
    assert run_tables.table_rates(results, best=True)[1][3] == "75.0 (50.0, 100.0)"
    assert run_tables.table_runs(results)[3][0] == "dpo-offline-2e-6-s0 (cut)"
    assert [row[0] for row in run_tables.table_progress(results, (2,))] == [
        "run",
        "dpo-16x128-2e-6-s1",
    ]


def test_shapes_are_compared_seed_by_seed():
    # Ends: many .75 and .25, few .5 and 0: by question the differences are .25 twice, so the
    # error is that of the seeds: sqrt(.125 / 2 + .125 / 2).
    results = {
        "dpo-16x128-2e-6-s0": make_result("00", "33"),
        "dpo-16x128-2e-6-s1": make_result("00", "11"),
        "dpo-offline-2e-6-s0": make_result("00", "22"),
        "dpo-offline-2e-6-s1": make_result("00", "00"),
        "dpo-offline-2e-6-s2": make_result("00", "44"),  # the other shape has no such seed
    }
    found = run_tables.compare_shapes(results, "2e-6", "16x128", "offline")
    assert found.value == pytest.approx(0.25)
    assert found.error == pytest.approx(math.sqrt(0.125), rel=1e-3)
    with pytest.raises(ValueError, match="no seed"):
        run_tables.compare_shapes(results, "2e-6", "16x128", "4x512")


def test_a_sign_is_paired_with_the_change_of_its_round_or_the_next():
    zeros, fours = "0" * 12, "4" * 12
    result = make_result(zeros, fours, fours, zeros, signs=(9, 0.3, 0.1, -0.2))
    results = {"dpo-16x128-5e-6-s0": result}
    now = sign_tables.pair_sign(results, "fresh_margin", lag=0)
    assert [(one.round, one.sign, one.change.value) for one in now] == [
        (1, 0.3, 1.0),
        (2, 0.1, 0.0),
        (3, -0.2, -1.0),
    ]
    assert [one.change.value for one in sign_tables.pair_sign(results, "fresh_margin", lag=1)] == [
        0,
        -1,
    ]
    assert sign_tables.correlate(now).value == pytest.approx(1.0)
    assert sign_tables.rank_falls(now, -1) == 1.0
    # To the end: 0 from before round 1, -1 from before rounds 2 and 3.
    assert [
        one.change.value for one in sign_tables.pair_sign(results, "fresh_margin", lag=None)
    ] == [*(0.0, -1.0, -1.0)]
    alarms = sign_tables.table_alarms(results, "fresh_margin", (0.0, 0.2), -1)
    assert alarms[1] == ["0", "1", "2", "1", "100.0 ± 39.7", "66.7", "-100.0"]
    assert alarms[2][:4] == ["0.2", "2", "2", "2"]
    assert sign_tables.table_leads(results, "fresh_margin", 0.2, -1)[1][1:4] == ["2", "1", "3"]


def test_decisions_are_listed():
    result = make_result("00", "44", "00")
    for number, one in enumerate(result["rounds"]):
        one |= {"start": 128 * (number - 1), "stop": 128 * number}
    broken = [{"bound": "guard.fall"}, {"bound": "guard.max_kl"}]
    guard = {"action": "retry", "to": 1, "broken": broken}
    size = {"prompts": 128, "reason": "the first round"}
    result["rounds"][1]["decisions"] = {"prompts_per_round": size, "guard": {"action": "none"}}
    result["rounds"][2]["decisions"] = {"prompts_per_round": size, "guard": guard}
    assert run_tables.table_decisions({"one": result})[1:] == [
        ["one", "1", "128", "rounds of 128", "the first round"],
        ["one", "2", "128", "retry to round 1", "guard.fall, guard.max_kl"],
    ]


def test_the_area_counts_pairs_in_the_wrong_order():
    fell, rose = Estimate(-0.1, -0.2, -0.05), Estimate(0.1, 0.0, 0.2)
    steps = [
        sign_tables.Step("r", 1, sign, change)
        for sign, change in ((-0.2, fell), (0.1, fell), (0.0, rose), (0.1, rose), (0.2, rose))
    ]
    # -0.2 is below all three; 0.1 is below one, equal to one and above one.
    assert sign_tables.rank_falls(steps, -1) == pytest.approx(4.5 / 6)
    assert math.isnan(sign_tables.rank_falls(steps[:2], -1))


def test_pass_at_k_is_that_of_all_subsets():
    counts = {"right": "0214", "samples": 4}
    assert run_tables.estimate_pass(counts, 1).value == pytest.approx(7 / 16)
    # Of 2 samples of 4: none right in 6/6, 1/6, 3/6 and 0/6 of the pairs.
    assert run_tables.estimate_pass(counts, 2).value == pytest.approx(
        1 - np.mean([1, 1 / 6, 0.5, 0])
    )
    with pytest.raises(ValueError, match="at most 4"):
        run_tables.estimate_pass(counts, 5)


def test_times_are_those_of_warm_rounds():
    assert run_tables.table_times({"one": make_result("0")})[1] == [
        *("one", "0.25", "10", "", "", "", "4.0", ""),
    ]


def test_a_table_is_aligned():
    assert curves.show([["run", "best"], ["a-long-name", "1"]]) == (
        "run          best\na-long-name     1"
    )
