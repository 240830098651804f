"""The samples that a page shows."""

import pytest

from halos_jax.report import recorded, samples
from halos_jax.report.recorded import read_run
from halos_jax.report.samples import (
    Column,
    choose_columns,
    collect_held_out,
    collect_trained,
    correlate_length,
    cut_text,
    spread,
)
from tests.report.written_runs import make_sample, write_config, write_lines, write_round, write_run

ROOM = 1_000_000


def test_held_out_prompts_stand_side_by_side_from_round_to_round(tmp_path):
    columns, said = choose_columns(read_run(write_run(tmp_path)))
    browser = collect_held_out(columns, ROOM)
    assert browser.columns == ("round 0 (SFT)", "round 1", "round 2 (best)")
    assert said == [] and browser.left_out == ()
    first = next(one for one in browser.prompts if one["id"] == "a")
    assert first["turns"] == [["user", "question a"]]
    assert [[sample[1] for sample in cell] for cell in first["cells"]] == [[0, 0], [0, 1], [1, 1]]
    assert first["cells"][2][1] == ["answer 1 of round 2", 1.0, "", 5, {}, 1]


def test_chosen_and_rejected_samples_are_marked(tmp_path):
    browser = collect_trained(read_run(write_run(tmp_path)), ROOM)
    assert [one["round"] for one in browser.prompts] == [1, 2]
    assert [one[:3] for one in browser.prompts[0]["cells"][0]] == [
        ["drawn 0", 0.0, "r"],
        ["drawn 1", 1.0, ""],
        ["drawn 2", 2.0, "c"],
    ]


@pytest.mark.parametrize("label, flag", [(1, "d"), (0, "u")])
def test_binary_feedback_and_cut_samples_are_marked(tmp_path, label, flag):
    write_config(tmp_path)
    write_round(tmp_path, 0)
    files = {
        "samples.jsonl": [make_sample("t", 0, finish_reason="length")],
        "scores.jsonl": [{"prompt_id": "t", "sample_id": 0, "reward": None}],
        "feedback.jsonl": [
            {"type": "binary_feedback", "prompt_id": "t", "sample_id": 0, "label": label}
        ],
    }
    write_round(tmp_path, 1, files=files)
    (prompt,) = collect_trained(read_run(tmp_path), ROOM).prompts
    assert prompt["cells"][0][0][1:3] == [None, f"{flag}t"]


def test_what_is_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MOST_ROUNDS", 2)
    monkeypatch.setattr(samples, "MOST_TRAINED", 2)
    write_run(tmp_path)
    drawn = {name: [make_sample("t", 0)] for name in ("samples.jsonl", "scores.jsonl")}
    write_round(tmp_path, 3, files=drawn, decisions={"best": {"round": 2, "reward": 1, "of": 3}})
    run = read_run(tmp_path)
    columns, said = choose_columns(run)
    assert [one.label for one in columns] == ["round 0 (SFT)", "round 2 (best)"]
    assert said == ["held-out samples of 2 of 3 evaluations are shown"]
    small = collect_held_out(columns, 0)
    assert small.prompts == () and small.left_out[0].startswith("0 of 2 held-out prompts are shown")
    trained = collect_trained(run, 0)
    assert trained.left_out == (
        "training samples of 2 of 3 rounds are shown",
        "0 of these rounds' 2 training prompts are shown, random",
    )


def test_prompts_that_gained_and_lost_most_come_first(tmp_path):
    first = {str(number): 0.5 for number in range(30)}
    last = first | {"7": 1.0, "8": 0.0}
    paths = [tmp_path / str(index) / "eval.jsonl" for index in range(2)]
    for path, rewards in zip(paths, (first, last), strict=True):
        write_lines(path, [make_sample(name, 0, reward=one) for name, one in rewards.items()])
    browser = collect_held_out([Column(str(path), path) for path in paths], ROOM)
    assert {"7", "8"} <= {one["id"] for one in browser.prompts[:3]}
    assert len(browser.prompts) == 30


def test_long_and_strange_texts():
    long = "a" * 5000 + "b" * 5000
    shown = cut_text(long)
    assert shown.startswith("a" * 4500 + "\n[... 4,000 characters left out ...]\n")
    assert shown.endswith("b" * 1500) and cut_text("short") == "short"


def test_a_megabyte_and_a_script_are_shown_as_text(tmp_path):
    path = tmp_path / "eval.jsonl"
    bad = "</script><script>alert(1)</script>"
    rows = [make_sample("a", 0, bad, 1.0), make_sample("a", 1, "x" * 1_000_000, float("inf"))]
    write_lines(path, rows)
    (prompt,) = collect_held_out([Column("samples", path)], ROOM).prompts
    assert prompt["cells"][0][0][0] == bad
    assert len(prompt["cells"][0][1][0]) < samples.LONGEST + 50
    assert prompt["cells"][0][1][1] is None  # a reward that is no number


def test_records_of_other_shapes(tmp_path):
    path = tmp_path / "eval.jsonl"
    row = make_sample("a", 0, extra={"answer": "4", "parts": [1, 2]})
    write_lines(path, [row | {"prompt": "plain text"}, make_sample("b", 0) | {"prompt": None}])
    browser = collect_held_out([Column("samples", path)], ROOM)
    found = {one["id"]: one for one in browser.prompts}
    assert found["a"]["turns"] == [["user", "plain text"]]
    assert found["a"]["extra"] == {"answer": "4", "parts": "[1, 2]"}
    assert found["b"]["turns"] == [["user", "null"]]


def test_length_and_reward_are_compared_within_a_prompt(tmp_path):
    """Between prompts they go together here, which says nothing of the policy."""
    path = tmp_path / "eval.jsonl"
    rows = [
        make_sample("a", 0, "one", 1.0),
        make_sample("a", 1, "one two", 0.0),
        make_sample("b", 0, "one two three four", 9.0),
        make_sample("b", 1, "one two three four five", 8.0),
    ]
    write_lines(path, rows)
    assert correlate_length(path) == pytest.approx(-1)
    write_lines(path, rows[:1])
    assert correlate_length(path) is None
    write_lines(path, [rows[0], rows[1] | {"reward": 1.0}])
    assert correlate_length(path) is None


@pytest.mark.parametrize(
    "count, wanted, expected",
    [(3, [1], [0, 1, 2]), (65, [7], [0, 7, 21, 64]), (100, [], [0, 33, 66, 99])],
)
def test_spread(count, wanted, expected):
    assert spread(count, 4, wanted) == expected


def test_files_that_a_page_had_before_are_not_read_again(tmp_path, monkeypatch):
    """And those that have changed are, as after a round that is done again."""
    run = read_run(write_run(tmp_path))
    read: list[str] = []

    def read_lines(path):
        read.append(f"{path.parent.name}/{path.name}")
        return recorded.read_lines(path)

    monkeypatch.setattr(samples, "read_lines", read_lines)

    def look():
        read.clear()
        columns, _ = choose_columns(run)
        correlate_length(columns[-1].path)
        return collect_held_out(columns, 10**6).prompts, collect_trained(run, 10**6).prompts

    first = look()
    assert sorted(read).count("0002/eval.jsonl") == 1 and len(read) == 3 + 2 * 3
    assert look() == first and read == []
    path = tmp_path / "rounds" / "0002" / "feedback.jsonl"
    path.write_text(path.read_text().replace('"label": 0', '"label": 1'))
    (tmp_path / "rounds" / "0001" / "eval.jsonl").write_text("")
    (held_out, trained) = look()
    assert set(read) == {
        "0001/eval.jsonl",
        *(f"0002/{name}.jsonl" for name in ("samples", "scores", "feedback")),
    }
    assert held_out[0]["cells"][1] is None and held_out[0]["cells"][0] == first[0][0]["cells"][0]
    marks = [[sample[2] for sample in one["cells"][0]] for one in (first[1][1], trained[1])]
    assert marks == [["r", "", "c"], ["c", "", "r"]]
