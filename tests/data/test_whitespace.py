"""Runs of spaces and tabs become one space; nothing else changes."""

from halos_jax.data.whitespace import collapse_prompt, collapse_record, collapse_text
from halos_jax.types import Completion, Preference, Prompt, Turn


def test_only_spaces_and_tabs_collapse():
    assert collapse_text("a  b\t\tc\n    d\n\ne") == "a b c\n d\n\ne"


def test_a_record_is_collapsed_in_the_fields_that_are_named():
    prompt = Prompt("1", (Turn("system", "s  s"), Turn("user", "u\tu")), {"answer": "4  2"})
    chosen, rejected = (Completion((Turn("assistant", text),)) for text in ("c  c", "r  r"))
    found = collapse_record(Preference(prompt, chosen, rejected), ("chosen",))
    assert found.prompt == collapse_prompt(prompt)
    assert [turn.content for turn in found.prompt.turns] == ["s s", "u u"]
    assert found.prompt.extra == prompt.extra
    assert found.chosen.turns[0].content == "c c" and found.rejected == rejected
