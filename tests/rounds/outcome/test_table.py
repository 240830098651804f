"""The table of rounds."""

import pytest

from halos_jax.config import ConfigError
from halos_jax.rounds.outcome.table import (
    count_tokens,
    format_rounds,
    last_round,
    read_rounds,
    read_rows,
)
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.told_rounds import (
    FIRST,
    SECOND,
    THIRD,
    commit_all,
    commit_rounds,
    name_scorers,
    time_rounds,
)


def test_a_table_of_all_rounds(tmp_path):
    """Steps are those of the round, seconds those of its stages; what a round lacks is "-"."""
    commit_rounds(tmp_path, FIRST, SECOND, {**THIRD, "response_tokens_mean": 6.0})
    time_rounds(tmp_path, 2)
    name_scorers(tmp_path, "rule")
    assert (
        format_rounds(tmp_path)
        == """\
round  pairs  steps        reward   win   rule    kl  margin  ties   cut  length  stale  sec  tok/s
    0      0      0  0.250 ±0.050     -  0.500     -       -     -     -     4.0      -    -      -
    1      7      3             -     -      -  1.23  -0.032  0.60  0.25       -   0.07    -      -
    2      7      2  0.250 ±0.050  0.55  0.500  1.23  -0.032  0.60  0.25     4.0   0.07  3.5     60
(no room for: prompts)"""
    )
    assert format_rounds(tmp_path, last=1).splitlines()[-1].split()[0] == "1"
    lines = format_rounds(tmp_path, most=2).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["round", "1", "2"]


def test_the_rounds_as_plain_numbers(tmp_path):
    commit_rounds(tmp_path, FIRST, SECOND)
    time_rounds(tmp_path, 1)
    first, second = read_rounds(str(tmp_path))
    assert first == {"round": 0} | FIRST and second["round"] == 1
    assert {name: second[name] for name in SECOND} == SECOND
    stages = [name for name in second if name.startswith("seconds/")]
    assert stages and sum(second[name] for name in stages) == read_rows(tmp_path, 1)[1].seconds


def test_a_folder_without_rounds_is_told(tmp_path):
    (tmp_path / "rounds").mkdir()
    for folder in (tmp_path, tmp_path / "none"):
        for read in (read_rounds, format_rounds):
            with pytest.raises(ConfigError, match=r"where there are no rounds.*/online"):
                read(folder)


def test_a_table_of_a_run_of_before(tmp_path):
    """Manifests without steps and signs; what no round has is no column."""
    metrics = {"reward_eval": 0.25, "reward_eval/rule": 0.5, "response_tokens_eval": 4.0}
    commit_rounds(tmp_path, metrics, {**metrics, "feedback_examples": 3})
    name_scorers(tmp_path, "rule")
    assert [line.split() for line in format_rounds(tmp_path).splitlines()] == [
        ["round", "prompts", "examples", "reward", "rule", "length"],
        ["0", "0", "0", "0.250", "0.500", "4.0"],
        ["1", "10", "3", "0.250", "0.500", "4.0"],
    ]


def test_examples_have_their_name_before_there_are_any(tmp_path):
    commit_rounds(tmp_path, {"reward_eval": 0.25})
    for made, name in (("pairwise", "pairs"), ("binary", "examples"), ("scalar", "examples")):
        name_scorers(tmp_path, feedback={"type": made})
        assert format_rounds(tmp_path).split()[:3] == ["round", "prompts", name]


def test_a_round_that_goes_back_says_from_which_one_it_started(tmp_path):
    names = ("sft", "sft", "round-0001", "round-0001")
    for round, name in enumerate(names):
        commit_all(round_folder(tmp_path, round), Manifest(round=round, stop=round, policy=name))
    table = [line.split()[:2] for line in format_rounds(tmp_path).splitlines()]
    assert table == [["round", "from"], ["0", "-"], ["1", "sft"], ["2", "1"], ["3", "1"]]
    assert "from" not in format_rounds(tmp_path, last=2)  # each from the one before it


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
    assert format_rounds(tmp_path).split() == ["round", "prompts", "pairs", *"000110"]


def test_a_narrow_terminal_gets_what_matters_most_and_a_log_file_everything(tmp_path):
    commit_rounds(tmp_path, FIRST, THIRD)
    time_rounds(tmp_path)
    name_scorers(tmp_path, "rule")
    whole = format_rounds(tmp_path, width=10_000).splitlines()
    names = "round prompts pairs steps reward win rule kl margin ties cut length stale sec tok/s"
    assert whole[0].split() == names.split() and len(whole) == 3
    for width, kept in ((60, "round pairs reward win rule kl margin"), (26, "round reward win")):
        lines = format_rounds(tmp_path, width=width).splitlines()
        assert lines[0].split() == kept.split() and max(map(len, lines[:3])) <= width
        told = " ".join(lines[3:])
        left = [name for name in names.split() if name not in kept.split()]
        assert told == f"(no room for: {', '.join(left)})"


def test_a_round_is_one_line_of_at_most_100_columns(tmp_path):
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
    commit_rounds(tmp_path, long, {**long, "kl_sft": 1234.5})
    name_scorers(tmp_path, scorer.removeprefix("reward_eval/"))
    lines = format_rounds(tmp_path).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "(no room for: prompts, stale)"
    wanted = "round pairs steps reward win a_function_wit kl margin ties cut length"
    assert lines[0].split() == wanted.split()


def test_the_rate_of_a_round_counts_all_its_sample_stages(tmp_path):
    """A round that got further prompts has sampled more than once."""
    commit_rounds(tmp_path, {}, {"samples": 20, "response_tokens_mean": 6.05})
    time_rounds(tmp_path, 1, ("sample", 2), ("sample 2", 1), ("train", 4))
    row = read_rows(tmp_path, last_round(tmp_path))[-1]
    assert count_tokens(row.metrics) == 121
    assert row.tokens_per_second == 121 / 3 and row.seconds == 7
    assert count_tokens({}) == 0
