"""Items from records: what is rendered, what is kept as sampled, what is cut."""

import dataclasses
import logging

import numpy as np
import pytest

from halos_jax.config import ConfigError
from halos_jax.data.lengths import Lengths
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.formats import preference_from_record, preference_to_record
from halos_jax.data.tokenize import (
    make_answer_items,
    make_controlled_items,
    make_each,
    make_group_items,
    make_pair_items,
    make_scored_items,
    make_unpaired_items,
    split_preferences,
)
from halos_jax.drawn import Drawn
from halos_jax.types import (
    CHOSEN,
    FINISH_LENGTH,
    MEMBER,
    MISMATCHED,
    REJECTED,
    TARGET,
    Completion,
    Item,
    Judgement,
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

    def render_prompts(self, prompts, max_length):
        return (self.render_prompt(turns, max_length) for turns in prompts)

    def render_responses(self, texts):
        return (self.render_response(text, finished=finished) for text, finished in texts)

    def render_prefix(self, text):
        return tuple(map(ord, text))


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
    (item,) = make_pair_items([dataclasses.replace(pair, weight=0.25)], RENDERER, Lengths(8, 64))
    assert item.weight == 0.25


def test_log_probs_of_pairs_are_cut_like_their_tokens_and_kept_where_both_have_them():
    halves = [
        complete("x", ids=(7, 8, 9), logps=(-1.0, -2.0, -3.0)),
        complete("y", ids=(7, 7), logps=(-0.5, -0.25)),
    ]
    known = Preference(make_prompt("abc"), *halves, prompt_ids=(5, 6))
    unknown = dataclasses.replace(known, rejected=dataclasses.replace(halves[1], logps=None))
    record = preference_to_record(known)
    assert preference_from_record(record) == known
    items = make_pair_items([known, unknown], RENDERER, Lengths(2, 4))
    assert [part.tolist() for part in items[0].old_logps] == [[-1, -2], [-0.5, -0.25]]
    assert items[1].old_logps == ()
    text = Preference(make_prompt("abc"), complete("x", logps=()), complete("y", logps=()))
    (item,) = make_pair_items([text], RENDERER, Lengths(2, 4))
    assert item.old_logps == ()  # an empty list says nothing of tokens that text is rendered to
    name = next(name for name in ("logps_A", "logps_B") if len(record[name]) == 3)
    with pytest.raises(RecordError, match=f"'{name}': got '2 numbers', allowed: one for .* .3."):
        preference_from_record({**record, name: [-1.0, -2.0]})


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


def test_a_prompt_without_room_for_a_response_is_an_error():
    sampled = Preference(
        make_prompt("a"), complete("", ids=(7, 8)), complete("", ids=(9,)), prompt_ids=(1,) * 9
    )
    with pytest.raises(ValueError, match="max_length: got 8, but a prompt has 9 tokens"):
        make_pair_items([sampled], RENDERER, Lengths(4, 8))
    judged = Judgement(make_prompt("a" * 20), complete("b"), True)
    with pytest.raises(ValueError, match=r"raise it, or lower sampling\.max_prompt_length"):
        make_unpaired_items([judged], RENDERER, Lengths(8, 8))


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


# --------------------------------------------------------------------------- unpaired


def judge(*triples):
    """Make judgements of (prompt, answer, desirable)."""
    return [Judgement(make_prompt(p, p), complete(a), label) for p, a, label in triples]


def test_the_mismatched_response_is_that_of_the_next_other_prompt():
    items = make_unpaired_items(
        judge(("a", "x", True), ("a", "y", False), ("b", "z", True), ("c", "x", False)),
        RENDERER,
        Lengths(8, 64),
    )
    assert [item.desirable for item in items] == [True, False, True, False]
    assert all(item.roles == (TARGET, MISMATCHED) for item in items)
    for item, (prompt, own, other) in zip(
        # The halves of a pair share a prompt: "y" is no mismatch for ("a", "x").
        items,
        [("a", "x", "z"), ("a", "y", "z"), ("b", "z", "x"), ("c", "x", "y")],
        strict=True,
    ):
        assert same(item, ids(prompt, 1), ids(own, END), ids(other, END))


def test_the_mismatched_response_never_is_the_examples_own():
    for triples in (
        [("a", "4", True), ("b", "4", False), ("c", "5", True)],  # other prompts, same answer
        [("a", "x", True), ("a", "x", False), ("a", "y", True)],  # one prompt alone
    ):
        for item in make_unpaired_items(judge(*triples), RENDERER, Lengths(8, 64)):
            assert len(item.responses) == 2
            assert list(item.responses[0]) != list(item.responses[1])
    # Cut to the room behind its prompt, another response may become equal to the own one.
    first, second = make_unpaired_items(
        judge(("aaaaa", "xy", True), ("b", "xz", True)), RENDERER, Lengths(8, 7)
    )
    assert same(first, ids("aaaaa", 1), ids("x")) and first.roles == (TARGET,)
    assert second.roles == (TARGET, MISMATCHED)


def test_a_data_set_of_one_answer_has_no_mismatch():
    (item,) = make_unpaired_items(judge(("a", "x", True)), RENDERER, Lengths(8, 64))
    assert same(item, ids("a", 1), ids("x", END)) and item.roles == (TARGET,)
    assert make_unpaired_items([], RENDERER, Lengths(8, 64)) == []


def test_sampled_judgements_keep_their_ids():
    sampled = Judgement(make_prompt("a"), complete("?", ids=(7, 8)), False, prompt_ids=(5, 6))
    (item,) = make_unpaired_items([sampled], RENDERER, Lengths(8, 64))
    assert same(item, [5, 6], [7, 8]) and not item.desirable


def test_preferences_split_into_halves_each_of_them_once():
    best, middle, worst = complete("best"), complete("middle"), complete("worst")
    prompt = make_prompt("a")
    pairs = [(best, worst), (best, middle), (middle, worst)]
    halves = split_preferences(Preference(prompt, *pair) for pair in pairs)
    found = [(one.completion, one.desirable) for one in halves]
    assert found == [(best, True), (worst, False), (middle, False), (middle, True)]


# --------------------------------------------------------------------------- groups to train on


def make_scored(prompt_id, reward, **fields):
    values = {"output": "ab", "prompt_ids": (), "response_ids": (), "finish_reason": "stop"}
    return Sample(make_prompt("q", prompt_id), 0, reward=reward, **(values | fields))


def test_all_samples_of_a_prompt_are_one_group():
    samples = [
        make_scored("p", 1.0, prompt_ids=(5,), response_ids=(6, 7), logps=(-1.0, -2.0)),
        make_scored("other", 3.0),
        make_scored("p", 0.5, prompt_ids=(5,), response_ids=(8, 9, 9, 9), logps=(-3.0,) * 4),
        make_scored("p", None, prompt_ids=(5,), response_ids=(8,), logps=(-3.0,)),
        make_scored("other", 2.0, finish_reason=FINISH_LENGTH),
    ]
    first, second = make_scored_items(samples, RENDERER, Lengths(8, 4))
    assert same(first, [5], [6, 7], [8, 9, 9])  # one is cut, one has no reward
    assert first.roles == (MEMBER, MEMBER) and first.rewards == (1.0, 0.5)
    assert [list(part) for part in first.old_logps] == [[-1, -2], [-3, -3, -3]]
    assert same(second, ids("q", 1), ids("ab"), ids("ab")) and second.rewards == (3.0, 2.0)
    assert second.old_logps == ()  # text does not say how likely it was


def test_what_a_group_was_drawn_from_is_cut_like_its_tokens():
    kept = np.array([6, 8, 9, 1, 9, 9], "<i4").tobytes()
    drawn = Drawn(0.7, (-0.5, -0.1, -0.2, 0.0), (2, 1, 2, 1), kept)
    fields = {"prompt_ids": (5,), "response_ids": (8, 9, 9, 9), "logps": (-3.0,) * 4}
    one = make_scored("p", 1.0, drawn=drawn, **fields)
    (item,) = make_scored_items([one, one], RENDERER, Lengths(8, 4))
    assert item.drawn == (drawn.cut(3),) * 2 and [len(one) for one in item.responses] == [3, 3]
    assert item.old_logps[1].tolist() == np.float32([-0.5, -0.1, -0.2]).tolist()
    other = make_scored("p", 1.0, **fields)
    with pytest.raises(ConfigError, match="p: 1 of the 2 samples of this prompt say what"):
        make_scored_items([one, other], RENDERER, Lengths(8, 4))


def test_a_group_has_one_prompt_whatever_its_id():
    shared = make_scored("p", 1.0, prompt_ids=(5,), response_ids=(6,))
    longer = make_scored("p", 2.0, prompt_ids=(4, 5), response_ids=(7,))
    other = dataclasses.replace(shared, prompt=make_prompt("r", "p"), prompt_ids=())
    items = make_scored_items([shared, longer, other], RENDERER, Lengths(8, 4))
    prompts = ([5], [4, 5], ids("r", 1))
    assert [list(item.prompt_ids) for item in items] == list(map(list, prompts))


def test_a_control_token_ends_the_prompt_of_each_answer_in_every_epoch_once(caplog):
    prompt, answer = make_prompt("abcdef"), complete("good", ids=(5, 6, END))
    judgements = [
        # Sampled behind a prefix of its own, which is not kept.
        Judgement(prompt, answer, True, prompt_ids=(9, 9, 9)),
        Judgement(prompt, complete("bad", finish_reason=FINISH_LENGTH), False),
    ]
    for _ in range(2):
        good, bad = make_controlled_items(judgements, RENDERER, Lengths(6, 64), ("+", "--"))
        assert same(good, ids("cdef", 1, ord("+")), [5, 6, END])
        assert same(bad, ids("def", 1, ord("-"), ord("-")), ids("bad"))
        assert (good.desirable, bad.desirable) == (True, False)
        assert good.roles == bad.roles == (TARGET,)
    assert "'--' is 2 tokens to this tokenizer" in caplog.text
    assert "'+'" not in caplog.text  # it is one token


# --------------------------------------------------------------------------- bad records


def test_a_record_of_which_no_item_can_be_made_is_an_error_or_left_out():
    good, long = make_prompt("q"), dataclasses.replace(make_prompt("r"), place="f line 2")
    answer = complete("a", ids=(7,))
    pairs = [Preference(good, answer, answer), Preference(long, answer, answer, (5,) * 9)]
    judged = [Judgement(one.prompt, answer, True, one.prompt_ids) for one in pairs]
    scored = [make_scored("p", 1.0), make_scored("q", 1.0, prompt_ids=(5,) * 9)]
    scored[1] = dataclasses.replace(scored[1], prompt=long)
    for make, records in (
        (make_pair_items, pairs),
        (make_unpaired_items, judged),
        (make_answer_items, judged),
        (make_scored_items, scored),
    ):
        with pytest.raises(ConfigError, match="the prompt of f line 2 has 9 tokens, which leaves"):
            make(records, RENDERER, Lengths(8, 6))
        errors = []
        (item,) = make(records, RENDERER, Lengths(8, 6), on_bad=errors.append)
        assert len(errors) == 1 and "f line 2" in str(errors[0])
        assert list(item.prompt_ids) == ids("q", 1)


def test_the_driver_keeps_order_and_counts_what_is_truncated(caplog):
    def make(number):
        if number == 2:
            yield items[0]
            raise RecordError("f line 2")
        yield items[number]
        yield None if number else items[number]

    ones = np.ones(1, np.int32)
    items = [Item(ones, (ones,), (TARGET,), weight=float(number)) for number in range(4)]
    errors = []
    with caplog.at_level(logging.INFO):
        found = make_each(range(4), make, "pairs", errors.append)
    assert [item.weight for item in found] == [0, 0, 1, 3]  # nothing of a bad one
    assert list(map(str, errors)) == ["f line 2"]
    assert "2 of 6 pairs left out: truncated responses" in caplog.text


# --------------------------------------------------------------------------- truncated responses


MASKED = Lengths(8, 6, mask_truncated=True)


def test_examples_with_a_truncated_response_are_left_out(caplog):
    whole, long, cut = complete("a"), complete("abcdefgh"), complete("b", finish_reason="length")
    prompt = make_prompt("q")
    pairs = [Preference(prompt, *pair) for pair in [(whole, long), (whole, whole), (cut, whole)]]
    with caplog.at_level(logging.INFO):
        (item,) = make_pair_items(pairs, RENDERER, MASKED)
    assert same(item, ids("q", 1), ids("a", END), ids("a", END))
    assert "2 of 3 pairs left out: truncated responses" in caplog.text
    judged = [Judgement(make_prompt(p, p), c, True) for p, c in [("q", long), ("r", whole)]]
    (item,) = make_unpaired_items(judged, RENDERER, MASKED)
    # What is left out still estimates the KL term of others.
    assert same(item, ids("r", 1), ids("a", END), ids("abcd"))
    assert len(make_pair_items(pairs, RENDERER, Lengths(8, 6))) == 3
    assert len(make_unpaired_items(judged, RENDERER, Lengths(8, 6))) == 2


def test_a_truncated_member_counts_in_its_group_and_has_no_target(caplog):
    samples = [
        make_scored("p", 1.0, prompt_ids=(5,), response_ids=(6, 7)),
        make_scored("p", 9.0, prompt_ids=(5,), response_ids=(8,) * 9),
        make_scored("p", 2.0, finish_reason=FINISH_LENGTH, prompt_ids=(5,), response_ids=(9,)),
        make_scored("other", 3.0, finish_reason=FINISH_LENGTH),
        make_scored("third", 4.0),
    ]
    with caplog.at_level(logging.INFO):
        first, third = make_scored_items(samples, RENDERER, MASKED)
    assert first.num_targets == (2, 0, 0) and first.rewards == (1.0, 9.0, 2.0)
    assert [len(part) for part in first.responses] == [2, 5, 1]
    assert third.masks == () and third.num_targets == (3,)
    assert "1 of 3 groups left out" in caplog.text
    first, other, _ = make_scored_items(samples, RENDERER, Lengths(8, 6))
    assert first.masks == other.masks == () and first.num_targets == (2, 5, 1)
