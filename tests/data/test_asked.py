"""Prompts from Python: texts become users' turns, and what is no prompt is refused."""

import pytest

from halos_jax.data.asked import read_asked
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.formats import make_prompt_id
from halos_jax.types import Prompt, Turn

KNOWN = Prompt("7", (Turn("user", "known"),))


def test_texts_become_turns_of_a_user_in_their_order():
    turns = (Turn("user", "new"),)
    assert read_asked([KNOWN, "new"]) == [KNOWN, Prompt(make_prompt_id(turns), turns)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("known", "got a string, allowed: a list"),
        ([3], "got 3, allowed: Prompts"),
        ([" "], "got ' ', allowed: Prompts"),
        (["a", "a"], "got one of them twice"),
    ],
)
def test_what_is_no_prompt_is_refused(given, message):
    with pytest.raises(RecordError, match=message):
        read_asked(given)
