"""mode=verify on samples that a judge has scored, as it was written and after it was tampered with.

No question is asked again: what the judge said is in its file.
"""

import json
import shutil

import pytest

from halos_jax.rewards.judge.cache import _make_line
from tests.e2e.tampering import edit_json, edit_lines, edit_row, hash_again, seal_again, verify

SAMPLES = [
    {"prompt_id": one, "sample_id": at, "prompt": f"say {one}", "output": f"{one}{at}"}
    for one in "ab"
    for at in range(2)
]


@pytest.fixture(scope="module")
def labelled(program, judge, tmp_path_factory):
    """Return a folder with a finished job, `run`, whose judge gives every answer 7 of 10."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    rubric = "{{ turns[0].content }} {{ response }}: Final Score: N\n"
    (folder / "rubric.jinja").write_text(rubric)
    overrides = (
        *("task=label", "model.path=", "feedback.type=scalar", "reward.path="),
        *("reward.kind=judge", "reward.judge.model=m", "reward.judge.key_variable="),
        *(f"reward.judge.url={judge}", f"reward.judge.prompt={folder / 'rubric.jinja'}"),
        *(f"data.train={folder / 'samples.jsonl'}", "data.eval="),
    )
    code, output, errors = program.run(folder / "run", *overrides)
    assert (code, errors) == (0, ""), output
    return folder


def change_answer(row: dict) -> None:
    row["text"] = row["text"].replace("7", "9")


def seal_answers(path) -> None:
    """Make the hashes of a judge's lines again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [_make_line({key: row[key] for key in row if key != "sha256"}) for row in rows]
    path.write_bytes(b"".join(lines))


def find_wrong(workdir) -> list[str]:
    return [
        f"{one.check}: {one.why}"
        for one in verify(workdir, derive=True)
        if one.outcome == "differs"
    ]


def test_what_a_judge_said_passes_without_asking_it(labelled, tmp_path):
    copy = shutil.copytree(labelled / "run", tmp_path / "copy")
    found = verify(copy, derive=True)
    assert [one for one in found if one.outcome == "differs"] == []
    made = {one.check: one.checked for one in found if "made again" in one.what}
    assert made["scores.jsonl"] == made["scored.jsonl"] == made["feedback.jsonl"] == 4


def edit_answer(workdir) -> None:
    edit_row("judge.jsonl", change_answer)(workdir)
    seal_answers(workdir / "judge.jsonl")


def edit_score(workdir) -> None:
    for name in ("scores.jsonl", "scored.jsonl", "feedback.jsonl"):
        edit_row(name, lambda row: row.update(reward=0.9))(workdir)
    for make_again in (hash_again, seal_again, hash_again):
        make_again(workdir)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edit_row("judge.jsonl", change_answer), "label: "),
        (edit_answer, "scores.jsonl: "),
        (edit_lines("judge.jsonl", lambda lines: lines.pop()), "label: "),
        (edit_row("scores.jsonl", {"reward": 0.9}), "files: scores.jsonl has sha256"),
        (edit_score, "scores.jsonl: "),
        (
            edit_json("config.json", lambda one: one["reward"]["judge"].update(model="other")),
            "chain: the manifest had another config",
        ),
    ],
    ids=["answer", "answer with hash", "answer lost", "score", "score with hashes", "model"],
)
def test_tampering_with_what_a_judge_said_is_found(labelled, tmp_path, edit, said):
    copy = shutil.copytree(labelled / "run", tmp_path / "copy")
    edit(copy)
    wrong = find_wrong(copy)
    assert any(line.startswith(said) for line in wrong), wrong


def test_another_prompt_of_the_judge_is_found(labelled, tmp_path):
    copy = shutil.copytree(labelled / "run", tmp_path / "copy")
    rubric = labelled / "rubric.jinja"
    before = rubric.read_text()
    rubric.write_text(before.replace("N", "M"))
    try:
        wrong = find_wrong(copy)
    finally:
        rubric.write_text(before)
    assert any(line.startswith("inputs: reward.judge.prompt") for line in wrong), wrong
