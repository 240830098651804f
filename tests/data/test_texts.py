"""Prompts and answers that came as text: each rendered once, cut, and an error for whose it is."""

import pytest

from halos_jax.config import ConfigError
from halos_jax.data.lengths import Lengths, Tally
from halos_jax.data.texts import Texts, make_array
from halos_jax.types import FINISH_LENGTH, Completion, Prompt, Turn
from tests.data.test_tokenize import LetterRenderer


class Counting(LetterRenderer):
    """Counts what it renders; prompts of the letter "t" do not get shorter than 9 tokens."""

    def __init__(self):
        self.prompts, self.responses = [], []

    def render_prompts(self, prompts, max_length):
        prompts = list(prompts)
        self.prompts += prompts
        return super().render_prompts(prompts, max_length)

    def render_responses(self, texts):
        texts = list(texts)
        self.responses += texts
        return super().render_responses(texts)

    def render_prompt(self, turns, max_length):
        if turns[0].content.startswith("t") and max_length < 9:
            raise ConfigError("max_length: too small")
        return super().render_prompt(turns, max_length)


def ask(text, place=""):
    return Prompt(text, (Turn("user", text),), place=place)


def say(text, **changes):
    return Completion((Turn("assistant", text),), **changes)


def test_each_distinct_text_is_rendered_once():
    renderer = Counting()
    answers = [say("x"), say("x"), say("x", finish_reason=FINISH_LENGTH), say("y", ids=(7,))]
    prompts = [ask("a"), ask("b"), ask("a")]
    texts = Texts(renderer, (one.turns for one in prompts), answers, Lengths(8, 16))
    assert renderer.prompts == [ask("a").turns, ask("b").turns]
    assert renderer.responses == [("x", True), ("x", False)]
    assert list(texts.prompt(ask("b"))) == [ord("b"), 1]
    found = [list(texts.response(one)) for one in answers]
    assert found == [[ord("x"), 0], [ord("x"), 0], [ord("x")], [7]]
    assert make_array((1, 2)).dtype == "int32"


def test_a_prompt_that_no_cut_makes_fit_is_the_error_of_who_asks_for_it():
    lengths = Lengths(4, 16)
    prompts = [ask("abcdef"), ask("tools and more")]
    texts = Texts(Counting(), (one.turns for one in prompts), (), lengths)
    assert list(texts.prompt(prompts[0])) == [*map(ord, "def"), 1]
    with pytest.raises(ConfigError, match=r"^f line 7: max_length: too small$"):
        texts.prompt(ask("tools and more", place="f line 7"))
    with pytest.raises(ConfigError, match=r"^max_length: too small$"):
        texts.prompt(prompts[1])
    assert lengths.cuts.prompts == Tally(2, 2, 15)
