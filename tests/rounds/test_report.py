"""What people read of an online run."""

import dataclasses
import json
import logging

from halos_jax.config import RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.course.budget_text import RoundSize
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.report import (
    format_rounds,
    list_signs,
    list_sizes,
    report_budget,
    report_end,
    report_round,
)
from halos_jax.workdir import manifests, timing
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_run

# What rounds of the newest kind say of themselves: an estimate, shares, signs.
FIRST = {"reward_eval": 0.25, "reward_eval/low": 0.2, "reward_eval/high": 0.3}
FIRST |= {"reward_eval/rule": 0.5, "response_tokens_eval": 4.0, "steps_done": 0}
SIGNS = {"kl_sampled": 1.234, "fresh_margin": -0.0321, "tied_share": 0.6, "kl_stale": 0.071}
SECOND = {"feedback_pairs": 7, "samples": 20, "truncated": 5, "steps_done": 3, **SIGNS}
THIRD = {**SECOND, **FIRST, "win_rate_eval": 0.55, "steps_done": 5}


def commit_all(folder, manifest) -> None:
    folder.mkdir(parents=True)
    for stage in manifests.stages_of(manifest.round):
        manifest = manifests.commit_stage(folder, manifest, stage)


def commit_rounds(workdir, *metrics):
    for round, found in enumerate(metrics):
        manifest = Manifest(round=round, start=2, stop=2 + 10 * round, metrics=found)
        commit_all(round_folder(workdir, round), manifest)


def name_scorers(workdir, *rules, **sections):
    reward = {"rules": [f"module:{name}" for name in rules], **sections.pop("reward", {})}
    (workdir / "config.json").write_text(json.dumps({"reward": reward, **sections}))


def time_rounds(workdir):
    lines = [
        {"round": round, "stage": stage, "start": start, "end": start + seconds}
        for round, stage, start, seconds in ((1, "sample", 0, 2), (1, "train", 9, 1.5))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / timing.FILE).write_text(text)


def test_a_table_of_all_rounds(tmp_path):
    """Steps are those of the round, seconds those of its stages; what a round lacks is "-"."""
    commit_rounds(tmp_path, FIRST, SECOND, THIRD)
    time_rounds(tmp_path)
    name_scorers(tmp_path, "rule")
    columns = zip(
        ("round", "0", "1", "2"),
        ("prompts", "0", "10", "20"),
        ("examples", "0", "7", "7"),
        ("steps", "0", "3", "2"),
        ("reward_eval", "0.250 ±0.050", "-", "0.250 ±0.050"),
        ("win", "-", "-", "0.55"),
        ("rule", "0.500", "-", "0.500"),
        ("kl", "-", "1.23", "1.23"),
        ("margin", "-", "-0.032", "-0.032"),
        ("ties", "-", "0.60", "0.60"),
        ("cut", "-", "0.25", "0.25"),
        ("tokens", "4.0", "-", "4.0"),
        ("stale", "-", "0.07", "0.07"),
        ("seconds", "-", "3.5", "-"),
        strict=True,
    )
    lines = format_rounds(tmp_path).splitlines()
    assert [line.replace(" ±", "±").split() for line in lines] == [
        [cell.replace(" ±", "±") for cell in row] for row in columns
    ]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert format_rounds(tmp_path, last=1).splitlines()[-1].split()[0] == "1"


def test_a_table_of_a_run_of_before(tmp_path):
    """Manifests without steps and signs; what no round has is no column."""
    metrics = {"reward_eval": 0.25, "reward_eval/rule": 0.5, "response_tokens_eval": 4.0}
    commit_rounds(tmp_path, metrics, {**metrics, "feedback_examples": 3})
    name_scorers(tmp_path, "rule")
    assert [line.split() for line in format_rounds(tmp_path).splitlines()] == [
        ["round", "prompts", "examples", "reward_eval", "rule", "tokens"],
        ["0", "0", "0", "0.250", "0.500", "4.0"],
        ["1", "10", "3", "0.250", "0.500", "4.0"],
    ]


def test_the_first_scorer_of_its_own_is_shown_before_rules_and_parts(tmp_path):
    names = ("part", "rule", "own", "other")
    commit_rounds(tmp_path, {f"reward_eval/{name}": 0.5 for name in names})
    sections = {"eval": {"scorers": {"own": {}, "other": {}}}, "reward": {"parts": {"part": {}}}}
    name_scorers(tmp_path, "rule", **sections)
    assert format_rounds(tmp_path).split()[3] == "own"
    name_scorers(tmp_path, "rule", reward=sections["reward"])
    assert format_rounds(tmp_path).split()[3] == "rule"
    name_scorers(tmp_path, reward=sections["reward"])
    assert format_rounds(tmp_path).split()[3] == "part"


def test_a_table_without_evaluation(tmp_path):
    for round in range(2):
        commit_all(round_folder(tmp_path, round), Manifest(round=round, stop=round))
    (tmp_path / "rounds" / ".DS_Store").write_text("")
    assert format_rounds(tmp_path).split() == ["round", "prompts", "examples", *"000110"]


def test_a_round_is_one_line_of_at_most_140_columns(tmp_path):
    scorer = "reward_eval/a_function_with_a_name_that_is_long"
    long = dict.fromkeys(THIRD, -123.456) | {
        "reward_eval/low": -222.2,
        "reward_eval/high": -22.2,
        scorer: -123.456,
        "kl_stale": 123.456,
        "response_tokens_eval": 12345.6,
        "samples": 3,
        "truncated": 3,
        "feedback_pairs": 12345,
        "steps_done": 12345,
    }
    del long["reward_eval/rule"]
    commit_rounds(tmp_path, long)
    name_scorers(tmp_path, scorer.removeprefix("reward_eval/"))
    assert max(map(len, format_rounds(tmp_path).splitlines())) <= 140


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


def test_a_finished_round_is_told_with_what_is_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    commit_rounds(tmp_path, FIRST, SECOND)
    time_rounds(tmp_path)
    config = dataclasses.replace(CONFIG, rounds=RoundsConfig(30, 10))
    run = make_run(workdir=tmp_path, config=config, prompts=PROMPTS * 8)
    done = manifests.load_manifest(round_folder(tmp_path, 1))
    report_round(run, done, Budget(40, 10, 0, ((2, 12),)))
    first, times, rest, *advice = [record.getMessage() for record in caplog.records]
    # 28 of the 40 prompts are left: three rounds.
    head, names, row = first.splitlines()
    assert head == "round 1 of 4 done:" and names.split()[:2] == ["round", "prompts"]
    assert row.split()[:4] == ["1", "10", "7", "3"]
    assert times == "time of round 1: sample 2.0 s, train 1.5 s, between 7.0 s"
    # 7 pairs of 10 prompts are less than half a batch each time: a step a round.
    assert rest == "3 rounds left; 0.70 pairs a prompt so far, so about 6 steps in all; about 10 s"
    assert [line.partition(" of the ")[0] for line in advice] == ["advice: 60%", "advice: 25%"]


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
    assert table == f"the last policy is in {tmp_path / 'final'}; round 0 is the SFT policy:\n" + (
        format_rounds(tmp_path)
    )
    # Said for the rate of rounds 1 and 2, and again for the one that came with round 3.
    assert [line.partition(": the learning rate is too high")[0] for line in advice] == [
        "advice of round 1",
        "advice of round 3",
    ]
    assert "=4e-06" in advice[0] and "=1e-06" in advice[1]


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
