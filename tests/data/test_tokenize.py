"""Items from records: what is rendered, what is kept as sampled, what is cut."""

import numpy as np
import pytest

from halos_jax.data.tokenize import Lengths, make_group_items, make_pair_items, make_target_items
from halos_jax.types import (
    CHOSEN,
    FINISH_LENGTH,
    MEMBER,
    REJECTED,
    TARGET,
    Completion,
    Preference,
    Prompt,
    Sample,
    Turn,
)

END = 0


class LetterRenderer:
    """A renderer whose tokens are the letters' code points: a header 1, an end marker 0."""

    def render_prompt(self, turns, max_length):
        text = "".join(turn.content for turn in turns)
        return (*map(ord, text[-(max_length - 1) :]), 1)

    def render_response(self, text, *, finished=True):
        return (*map(ord, text), *((END,) if finished else ()))


RENDERER = LetterRenderer()


def ids(text, *marker):
    return [*map(ord, text), *marker]


def make_prompt(text, prompt_id="p"):
    return Prompt(prompt_id, (Turn("user", text),))


def complete(text, **fields):
    return Completion((Turn("assistant", text),), **fields)


def same(item, prompt_ids, *responses):
    np.testing.assert_array_equal(item.prompt_ids, prompt_ids)
    assert len(item.responses) == len(responses)
    for got, expected in zip(item.responses, responses, strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, expected)
    return True


def test_text_pairs_are_rendered_with_an_end_marker_where_they_ended():
    pair = Preference(
        make_prompt("abc"),
        complete("good", reward=2.0),
        complete("bad", reward=-1.5, finish_reason=FINISH_LENGTH),
    )
    (item,) = make_pair_items([pair], RENDERER, Lengths(8, 64))
    assert same(item, ids("abc", 1), ids("good", END), ids("bad"))
    assert item.roles == (CHOSEN, REJECTED)
    assert item.rewards == (2.0, -1.5)
    assert item.weight == 1.0


def test_sampled_ids_are_kept_as_they_are():
    pair = Preference(
        make_prompt("abc"),
        complete("not what was sampled", ids=(7, 8, 9)),
        complete("nor this", ids=(7, 7)),
        prompt_ids=(5, 6),
    )
    (item,) = make_pair_items([pair], RENDERER, Lengths(2, 64))
    assert same(item, [5, 6], [7, 8, 9], [7, 7])
    assert item.rewards == (0.0, 0.0)


def test_prompts_and_responses_are_cut_to_their_limits():
    pair = Preference(make_prompt("abcdef"), complete("123456"), complete("12"))
    (item,) = make_pair_items([pair], RENDERER, Lengths(4, 8))
    assert same(item, ids("def", 1), ids("1234"), ids("12", END))
    (item,) = make_target_items([(make_prompt("abcdef"), "123456")], RENDERER, Lengths(3, 4))
    assert same(item, ids("ef", 1), ids("1"))


def test_a_prompt_without_room_for_a_response_is_an_error():
    sampled = Preference(
        make_prompt("a"), complete("", ids=(7, 8)), complete("", ids=(9,)), prompt_ids=(1,) * 9
    )
    with pytest.raises(ValueError, match="max_length: got 8, but a prompt has 9 tokens"):
        make_pair_items([sampled], RENDERER, Lengths(4, 8))
    with pytest.raises(ValueError, match=r"raise it, or lower sampling\.max_prompt_length"):
        make_target_items([(make_prompt("a" * 20), "b")], RENDERER, Lengths(8, 8))


def test_demonstrations_become_targets_in_their_order():
    conversations = [(make_prompt("q"), "answer"), (make_prompt("r"), "")]
    first, second = make_target_items(iter(conversations), RENDERER, Lengths(8, 64))
    assert same(first, ids("q", 1), ids("answer", END))
    assert same(second, ids("r", 1), [END])
    assert first.roles == second.roles == (TARGET,)


def make_samples(*shapes):
    """Make samples of (prompt ids, response length), each response of its own number."""
    return [
        Sample(make_prompt("?"), number, "", prompt, (100 + number,) * length, "stop")
        for number, (prompt, length) in enumerate(shapes)
    ]


def test_samples_of_a_prompt_are_grouped_up_to_the_limit():
    samples = make_samples(
        ((1, 2), 3), ((1, 2), 3), ((1, 2), 4), ((1, 2), 1), ((3,), 2), ((3,), 9), ((1, 2), 1)
    )
    items, members = make_group_items(samples, max_tokens=10)
    assert members == [[0, 1], [2, 3], [4], [5], [6]]
    for item, numbers in zip(items, members, strict=True):
        assert same(
            item,
            samples[numbers[0]].prompt_ids,
            *(samples[number].response_ids for number in numbers),
        )
        assert item.roles == (MEMBER,) * len(numbers)
        assert item.num_tokens <= 10
    _, members = make_group_items(samples, max_tokens=1000)
    assert members == [[0, 1, 2, 3], [4, 5], [6]]
    assert make_group_items([], max_tokens=10) == ([], [])


def test_a_sample_longer_than_the_limit_stands_alone():
    # The planner then says what to do about it.
    _, members = make_group_items(make_samples(((1,), 50), ((1,), 2)), max_tokens=10)
    assert members == [[0], [1]]
