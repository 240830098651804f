"""Questions to a judge: every turn is shown, and a template's mistake is found at the start."""

import pytest

from halos_jax.config import ConfigError
from halos_jax.config.rewards import JudgeConfig
from halos_jax.rewards.judge.prompts import make_question
from halos_jax.types import Prompt, Turn

PROMPT = Prompt(
    "p",
    (
        Turn("system", "Be {{ brief }}."),
        Turn("user", "1 + 1?"),
        Turn("assistant", "2"),
        Turn("user", "<b>And</b> 2 + 2?"),
    ),
    {"answer": "4"},
)


def test_the_templates_of_the_package_show_every_turn():
    system, user = make_question(JudgeConfig(lowest=1, highest=5.5))(PROMPT, "It is {{ 4 }}.")
    assert (system["role"], user["role"]) == ("system", "user")
    assert "from 1 (" in system["content"] and "to 5.5 (" in system["content"]
    shown = [user["content"].index(turn.content) for turn in PROMPT.turns]
    # Nothing in a text is a template or is escaped.
    assert shown == sorted(shown) and "It is {{ 4 }}." in user["content"][shown[-1] :]
    assert user["content"].endswith("Final Score: ...")

    system, user = make_question(JudgeConfig(mode="compare"))(PROMPT, "four", "five")
    first, second = user["content"].index("four"), user["content"].index("five")
    assert user["content"].index("<answer_A>") < first < user["content"].index("<answer_B>")
    assert first < second and "Final Verdict: tie" in user["content"]


def test_templates_from_files(tmp_path):
    rubric, prompt = tmp_path / "rubric.jinja", tmp_path / "prompt.jinja"
    rubric.write_text("The right answer is {{ record.answer }}.")
    prompt.write_text("{% for turn in turns %}{{ turn.role[0] }}{% endfor %}: {{ response }}\n")
    question = make_question(JudgeConfig(rubric=str(rubric), prompt=str(prompt)))
    assert question(PROMPT, "5") == [
        {"role": "system", "content": "The right answer is 4."},
        {"role": "user", "content": "suau: 5"},
    ]
    with pytest.raises(ConfigError, match="filled in for prompt other "):
        question(Prompt("other", PROMPT.turns), "5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ response_a }}", r"uses response_a, allowed: highest, lowest, record, response, turns"),
        ("\n{% for %}", r"line 2: .*; allowed: a Jinja template"),
        (None, r"reward\.judge\.prompt: got .*, which cannot be read"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "prompt.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_question(JudgeConfig(prompt=str(path)))


def test_a_template_is_kept_in_its_box(tmp_path):
    path = tmp_path / "prompt.jinja"
    path.write_text("{{ response.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="cannot be filled in"):
        make_question(JudgeConfig(prompt=str(path)))(PROMPT, "x")
