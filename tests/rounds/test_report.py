"""What people read of an online run."""

import dataclasses
import json
import logging
import shutil

from halos_jax.config import RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.console import compiling
from halos_jax.course.budget_text import RoundSize
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.outcome.table import format_rounds
from halos_jax.rounds.report import (
    list_signs,
    list_sizes,
    report_budget,
    report_end,
    report_resumed,
    report_round,
    report_stage,
)
from halos_jax.workdir import manifests, timing
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_run
from tests.rounds.told_rounds import FIRST, SECOND, commit_rounds, time_rounds


def test_sizes_of_rounds_are_those_of_the_budget():
    """Two prompts to skip; 2 samples a prompt make at most one pair."""
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=2))
    found = list_sizes(config, Budget(20, 8, 2), 15, {1: 1, 2: 3}.__getitem__)
    assert found == [RoundSize(8, 8, 4), RoundSize(5, 5, 9)]  # 5 pairs are 3 steps (2.5 rounds up)


def test_a_budget_is_told_with_its_traps(caplog):
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(
        CONFIG,
        sampling=SamplingConfig(num_samples_per_prompt=3),
        rounds=RoundsConfig(total_prompts=20, prompts_per_round=8),
    )
    report_budget(config, Budget(20, 8), 100, lambda round: 1)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "INFO", "INFO", "WARNING"]
    assert "3 rounds of 4 to 8 prompts, 20 in all; 3 samples a prompt, 60 in all" in caplog.text
    assert "train.batch_size=32 is more than the 8 pairs" in caplog.text


def test_the_time_left_does_not_count_what_the_first_round_compiled(tmp_path, caplog, monkeypatch):
    """3.5 s for 10 prompts, 2 s of them compiling: 28 prompts more take 4.2 s and not 9.8 s."""
    caplog.set_level(logging.INFO)
    commit_rounds(tmp_path, FIRST, SECOND)
    time_rounds(tmp_path)
    budget = Budget(40, 10, 0, ((2, 12),))
    run = make_run(workdir=tmp_path, prompts=PROMPTS * 8, budget=budget)
    monkeypatch.setattr(compiling, "take_seconds", lambda: 2.0)
    report_stage(run, 1, "train", 1.5, {"steps": 3})
    assert caplog.messages[-1].endswith("2.0 s of it compiling; about 4 s left of the run")
    again = make_run(workdir=tmp_path, prompts=PROMPTS * 8, budget=budget)
    monkeypatch.setattr(compiling, "take_seconds", lambda: 0.0)
    report_stage(again, 2, "train", 1.5, {"steps": 3})
    assert caplog.messages[-1].endswith("about 10 s left of the run")


def test_a_finished_round_is_told_with_what_is_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    commit_rounds(tmp_path, FIRST, SECOND)
    time_rounds(tmp_path)
    config = dataclasses.replace(CONFIG, rounds=RoundsConfig(30, prompts_per_round=10))
    called: list[str] = []
    run = make_run(
        workdir=tmp_path,
        config=config,
        prompts=PROMPTS * 8,
        on_round=lambda: called.append(caplog.messages[0].splitlines()[0]),
    )
    done = manifests.load_manifest(round_folder(tmp_path, 1))
    report_round(run, done, Budget(40, 10, 0, ((2, 12),)))
    assert called == ["round 1 of 4 is done:"]
    first, rest, *advice = [record.getMessage() for record in caplog.records]
    # 28 of the 40 prompts are left: three rounds.
    assert first == "round 1 of 4 is done:\n" + format_rounds(tmp_path)
    assert [line.split()[0] for line in first.splitlines()[1:]] == ["round", "0", "1"]
    # 7 pairs of 10 prompts are less than half a batch each time: a step a round.
    assert rest == "3 rounds left; 0.70 pairs a prompt so far, so about 6 steps in all; about 10 s"
    assert [line.partition(" of the ")[0] for line in advice] == ["advice: 60%", "advice: 25%"]
    # The metrics get what nothing else has written: no signs, no evaluation.
    assert run.writer.calls == [
        (
            "write",
            3,
            {
                "round": 1,
                "feedback_pairs": 7,
                "samples": 20,
                "truncated": 5,
                "steps_done": 3,
                "seconds/sample": 2.0,
                "seconds/train": 1.5,
                "seconds": 3.5,
                "sampled_tokens_per_second": 0.0,
            },
        ),
        ("flush",),
    ]


def test_a_stage_is_told_with_the_time_that_is_left(tmp_path, caplog, monkeypatch):
    """Ten prompts took 3.5 s, so 28 take about 10 s, of which two stages of a second are done."""
    caplog.set_level(logging.INFO)
    commit_rounds(tmp_path, FIRST, SECOND)
    run = make_run(workdir=tmp_path, prompts=PROMPTS * 8, budget=Budget(40, 10, 0, ((2, 12),)))
    compiled = iter([0.0, 1.26])
    monkeypatch.setattr("halos_jax.console.compiling.take_seconds", compiled.__next__)
    report_stage(run, 1, "train", 2.0, {"steps": 1})  # no round has a time yet
    round_folder(tmp_path, 2).mkdir()
    manifests.save_manifest(round_folder(tmp_path, 2), Manifest(round=2, start=12, stop=22))
    lines = [
        {"round": round, "stage": stage, "start": 0, "end": seconds}
        for round, stage, seconds in ((1, "train", 3.5), (2, "sample", 1), (2, "score", 1))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / timing.FILE).write_text(text)
    report_stage(run, 2, "score", 2.0, {"samples": 40})
    assert caplog.messages == [
        "round 1, train: 1 step in 2.0 s; 0.5 steps/s",
        "round 2, score: 40 samples in 2.0 s; 20 samples/s; 1.3 s of it compiling; about 8 s left "
        "of the run",
    ]


def test_a_run_that_goes_on_tells_its_rounds_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = make_run(workdir=tmp_path)
    report_resumed(run)
    assert not caplog.messages
    commit_rounds(tmp_path, FIRST, SECOND)
    round_folder(tmp_path, 2).mkdir()
    manifests.save_manifest(round_folder(tmp_path, 2), Manifest(round=2, start=12, stop=22))
    report_resumed(run)
    assert caplog.messages == ["done before:\n" + format_rounds(tmp_path, last=1)]


def test_the_end_tells_the_table_and_the_advice_with_the_rate_of_each_round(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    margin = {"fresh_margin": -0.2, "fresh_margin/low": -0.3, "fresh_margin/high": -0.1}
    commit_rounds(tmp_path, {"steps_done": 0}, *[{"steps_done": 4, **margin}] * 3)
    run = make_run(workdir=tmp_path)
    changed = {"optimizer.learning_rate": [8e-6, run.config.optimizer.learning_rate]}
    segments = ({"round": 3, "step": 4, "changed": changed},)
    run.workspace.info.history = History(run.config, segments=segments)
    report_end(run, f"the last policy is in {tmp_path / 'final'}")
    table, *advice = [record.getMessage() for record in caplog.records]
    said = f"the last policy is in {tmp_path / 'final'}; round 0 is the SFT policy"
    assert table == said  # the table of round 3 was whole
    # Said for the rate of rounds 1 and 2, and again for the one that came with round 3.
    assert [line.partition(": the learning rate is too high")[0] for line in advice] == [
        "advice of round 1",
        "advice of round 3",
    ]
    assert "=4e-06" in advice[0] and "=1e-06" in advice[1]


def test_the_end_has_the_table_where_it_was_cut_or_a_test_came_after_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    commit_rounds(tmp_path, *[{"steps_done": 0}] * 13)
    report_end(make_run(workdir=tmp_path), "done")
    assert caplog.messages[0] == "done; round 0 is the SFT policy:\n" + format_rounds(tmp_path)
    assert len(caplog.messages[0].splitlines()) == 15
    shutil.rmtree(round_folder(tmp_path, 12))
    caplog.clear()
    report_end(make_run(workdir=tmp_path), "done")
    report_end(make_run(workdir=tmp_path, test=PROMPTS[:1]), "done")
    assert [len(message.splitlines()) for message in caplog.messages] == [1, 14]


def test_the_signs_of_rounds_have_the_rate_of_the_config_and_the_guards_factor(tmp_path):
    commit_rounds(tmp_path, *[{"steps_done": 4, "fresh_margin": -0.0001, "kl_sft": -0.001}] * 3)
    back = {"guard": {"action": "retry", "to": 0, "rate_factor": 0.5}}
    path = round_folder(tmp_path, 1)
    for file in path.glob("manifest*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "decisions": back}))
    run = make_run(workdir=tmp_path)
    run.workspace.info.history = History(run.config, segments=())
    rate = run.config.optimizer.learning_rate
    told = [(one.rate, one.factor, one.back_to) for one in list_signs(run, 2)]
    assert told == [(rate, 1.0, None), (rate, 1.0, 0), (rate, 0.5, None)]
    names, row, *_ = (line.split() for line in format_rounds(tmp_path).splitlines())
    shown = dict(zip(names, row, strict=True))
    assert (shown["kl"], shown["margin"]) == ("0.00", "+0.000")
