"""What a prompt opens stands once, and is closed where an answer has no thought."""

import pytest

from halos_jax.data.chat.thoughts import (
    Thought,
    continue_thought,
    find_thought,
    has_thought,
)


@pytest.mark.parametrize(
    ("opening", "tags", "end"),
    [
        ("<think>\n", ("<think>", "</think>"), "\n</think>\n\n"),
        ("<think>", ("<think>", "</think>"), "\n\n</think>\n\n"),
        ("<seed:think>\n", ("<seed:think>", "</seed:think>"), "\n</seed:think>\n\n"),
        ("[THINK]", ("[THINK]", "[/THINK]"), "\n\n[/THINK]\n\n"),
        (
            "<|START_THINKING|>",
            ("<|START_THINKING|>", "<|END_THINKING|>"),
            "\n\n<|END_THINKING|>\n\n",
        ),
        (
            "<|begin_of_thought|>\n",
            ("<|begin_of_thought|>", "<|end_of_thought|>"),
            "\n<|end_of_thought|>\n\n",
        ),
        # The prompt has ended the thought: there is nothing to close.
        ("<think>\n\n</think>\n\n", ("<think>", "</think>"), ""),
        ("Answer: ", (), ""),
        ("<|assistant|>", (), ""),
        ("", (), ""),
    ],
)
def test_thoughts_of_templates(opening, tags, end):
    thought = find_thought(opening)
    assert (thought.opening, thought.tags, thought.end) == (opening, tags, end)
    assert thought.is_closed == ("</think>" in opening)


def test_a_template_that_shows_reasoning_says_how_it_ends():
    assert find_thought("<think>\n", "\n</think>\n").end == "\n</think>\n"
    assert find_thought("<think>\n", "another thing").end == "\n</think>\n\n"


OPENED, CLOSED = find_thought("<think>\n"), find_thought("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("thought", "text", "continued"),
    [
        (OPENED, "<think>\nadd\n</think>\n\nfour", "add\n</think>\n\nfour"),
        (OPENED, " <think>add</think>four", "add</think>four"),
        (OPENED, "<think>\n\nadd</think>four", "\nadd</think>four"),
        (OPENED, "add\n</think>\n\nfour", "add\n</think>\n\nfour"),  # as it is sampled
        (OPENED, "four", "\n</think>\n\nfour"),
        (OPENED, "", "\n</think>\n\n"),
        (OPENED, "a <think> b", "\n</think>\n\na <think> b"),
        (CLOSED, "four", "four"),
        (CLOSED, "<think>\n\n</think>\n\nfour", "four"),
        (CLOSED, "<think>\nadd\n</think>\n\nfour", "<think>\nadd\n</think>\n\nfour"),
        (Thought(), " four ", " four "),
        (Thought("Answer: "), "Answer: four", "four"),
        (Thought("Answer: "), "four", "four"),
    ],
)
def test_what_the_prompt_has_stands_once(thought, text, continued):
    assert continue_thought(text, thought) == continued


def test_a_thought_has_words():
    assert has_thought("<think>\nadd\n</think>\n\nfour", CLOSED)
    assert not has_thought("<think>\n\n</think>\n\nfour", CLOSED)
    assert not has_thought("four", CLOSED)
