"""The model card: what it says of a run, and that no text in it is anything but data."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from halos_jax.report import card
from halos_jax.report.card import make_adapter_card, make_card, quote
from halos_jax.report.recorded import read_run
from halos_jax.workdir.seals import certificate
from tests.report.written_runs import write_config, write_lines, write_run

# What somebody could write to get out of its place: YAML, a table, a block, HTML, a heading.
EVIL = "x\n---\nlicense: mit\n# Heading | `a` ```\n</script><img src=x onerror=alert(1)> [y](z) ${{"


def make(workdir, **fields) -> tuple[dict, str]:
    """Return the metadata and the text of the card of a run of two rounds."""
    text = make_card(read_run(write_run(workdir, **fields)), workdir / "final")
    return ModelCard(text).data.to_dict(), text


def test_it_says_what_the_run_has_recorded(tmp_path):
    data, text = make(
        tmp_path / "first",
        model__path="org/model",
        data__train="shp@train,ultrachat_200k@train",
        loss={"name": "dpo", "beta": 0.1},
        seed=7,
    )
    assert data == {
        "base_model": "org/model",
        "datasets": data["datasets"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["halos_jax", "online", "dpo"],
    }
    assert "stanfordnlp/SHP" in data["datasets"] and text.startswith("---\n")
    assert (
        "# `org/model`, `online`, `dpo`\n" in text
        and "from `org/model`. It is the policy of round 2: the " in text
    )
    for line in ("| seed | `7` |", "| loss | `name=dpo, beta=0.1` |", "| start | `org/model` |"):
        assert line in text.splitlines()
    # The curve: a row a round, with the held-out reward and its interval.
    [header] = [line for line in text.splitlines() if line.startswith("| `round`")]
    assert "`held-out reward`" in header and "`KL`" in header and "`time`" not in header
    rows = [line for line in text.splitlines() if line[:4] in ("| 0 ", "| 1 ", "| 2 ")]
    assert [line.count("±0.100") for line in rows] == [1, 1, 1] and "1.000 ±0.100" in rows[2]
    assert "Not chosen yet" in text and card.is_own(text)


def test_a_recipe_has_fields_that_matter_and_no_path_of_this_machine(tmp_path):
    secret = tmp_path / "home" / "alice"
    secret.mkdir(parents=True)
    (secret / "pairs.jsonl").write_text("")
    path = str(secret / "pairs.jsonl")
    _, text = make(tmp_path / "a", data__train=path, model__path=str(secret), progress=False)
    recipe = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert recipe["data.train"] == "pairs.jsonl" and recipe["model.path"] == "alice"
    assert "progress" not in recipe and "workdir" not in recipe
    assert str(tmp_path) not in text and "base_model" not in text


def test_a_branch_is_told_of_without_the_folders_of_this_machine(tmp_path):
    origin = {"workdir": str(tmp_path / "alice" / "first"), "round": 3}
    data, _ = make(tmp_path / "plain", model__path="org/model")
    workdir = write_run(
        tmp_path / "second",
        model__path="org/model",
        model__reference=str(tmp_path / "alice" / "other"),
        branch__workdir=origin["workdir"],
    )
    path = workdir / "rounds" / "0000" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": origin}))
    text = make_card(read_run(workdir), workdir / "final")
    assert "from `org/model`, going on from a policy of the run `first`. It is" in text
    assert "| branch of round 3 of first |" in text and "| reference model | `other` |" in text
    assert str(tmp_path) not in text and ModelCard(text).data.to_dict() == data
    path.write_text(path.read_text().replace('"round": 3}', '"round": 0}'))
    assert "| branch of the end of first |" in make_card(read_run(workdir), workdir / "final")


@pytest.mark.parametrize(
    "field",
    ["model__path", "data__train", "data__eval", "data__system_prompt", "reward__function", "loss"],
)
def test_a_text_is_data_whatever_it_spells(tmp_path, field):
    value = {"name": EVIL, EVIL: EVIL} if field == "loss" else EVIL
    data, text = make(tmp_path / "run", **{field: value})
    plain, _ = make(tmp_path / "plain" / "run")
    assert data | {"tags": 0, "base_model": 0} == plain | {"tags": 0, "base_model": 0}
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    body = text.split("\n---\n", 1)[1]
    # Nothing of it begins a line, and every mark of it is inside of code.
    starts = ("license:", "# Heading", "</script>", "<img", "---\n")
    assert not [line for line in body.splitlines() if line.startswith(starts)]
    outside = strip_code(body)
    for mark in ("<img", "</script>", "alert(1)", "[y](z)", "# Heading"):
        assert mark not in outside


def strip_code(text: str) -> str:
    """Return Markdown without its code, by the rules of CommonMark for blocks and inline code."""
    left, fence = [], ""
    for line in text.splitlines():
        if fence:
            fence = "" if line.strip() == fence else fence
            continue
        if line.startswith("```"):
            fence = "```"
            continue
        out, rest = "", line
        while "`" in rest:
            before, _, after = rest.partition("`")
            count = 1 + len(after) - len(after.lstrip("`"))
            inner = after.lstrip("`")
            runs = [one for one in find_runs(inner) if one[1] == count]
            out += before + ("" if runs else "`" * count)
            rest = inner[runs[0][0] + count :] if runs else inner
        left.append(out + rest)
    return "\n".join(left)


def find_runs(text: str) -> list[tuple[int, int]]:
    """Return the place and the length of each run of backticks."""
    found, place = [], 0
    while place < len(text):
        length = len(text[place:]) - len(text[place:].lstrip("`"))
        if length:
            found.append((place, length))
        place += max(length, 1)
    return found


def test_inline_code_holds_any_text():
    assert quote("a`b``c") == "```a`b``c```" and quote("`x") == "`` `x ``"
    assert quote("a\nb\r\x1b[31m\u2028c") == "`a b [31m c`"
    assert quote("a\\|b") == "`a\\ \\|b`"  # GitHub takes two backslashes and a bar for a cell's end
    assert quote("a|b") == "`a\\|b`" and quote("") == "` `"
    assert len(quote("x" * 5000)) < 320


def test_names_of_rewards_cannot_break_the_table(tmp_path):
    workdir = write_run(tmp_path)
    path = workdir / "rounds" / "0002" / "manifest.json"
    plain = json.loads(path.read_text())
    plain["metrics"]["reward_eval/<b>|x`"] = 0.5
    path.write_text(json.dumps(plain))
    text = make_card(read_run(workdir), workdir / "final")
    lines = [line for line in text.splitlines() if line.startswith(("| `round`", "| 0 ", "| 2 "))]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<b>" not in strip_code(text)


def test_a_training_has_its_evaluations_and_a_reward_model_its_own_kind(tmp_path):
    write_config(tmp_path, task="reward_model", model__path="org/base", data__train="x@train")
    rows = [{"step": step, "loss/train": 1.0} for step in range(1, 100)]
    rows += [{"step": step, "loss/eval": 0.7 - step / 1000} for step in range(0, 100, 2)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text = make_card(read_run(tmp_path), tmp_path / "final", license="apache-2.0")
    data = ModelCard(text).data.to_dict()
    assert (data["pipeline_tag"], data["license"]) == ("text-classification", "apache-2.0")
    assert "16 of 50 rows, evenly." in text and "| 0 | 0.7 |" in text and "| 98 | 0.602 |" in text
    assert "bradley-terry" in data["tags"] and "As chosen by who made it: `apache-2.0`." in text


def test_an_adapter_has_a_card_of_its_own(tmp_path):
    write_config(tmp_path, model__path="org/base", lora__rank=8, task="sft")
    data = ModelCard(make_adapter_card(read_run(tmp_path), license="mit")).data.to_dict()
    assert (data["base_model"], data["library_name"], data["license"]) == (
        "org/base",
        "peft",
        "mit",
    )
    assert data["base_model_relation"] == "adapter" and "lora" in data["tags"]


def test_what_somebody_edits_is_told_from_what_is_its_own(tmp_path):
    _, text = make(tmp_path)
    assert not card.is_own(text.replace("# `", "# My ", 1)) and not card.is_own("# Mine\n")
    made = {"chain": {"head": "abc"}, "verified": None, "sha256": "def"}
    about = certificate.describe_certificate(made)
    assert card.is_own(f"{text}\n\n{about}\n")  # a verification adds it
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / certificate.FILE).write_text(json.dumps(made))
    again = make_card(read_run(tmp_path), tmp_path / "final")
    assert about in again and card.is_own(again)
    before, after = certificate.split_card(again)
    assert card.is_own(before + after) and "Nobody has verified the run yet." in again
