"""What limits of length cut, and that it is counted and said."""

import dataclasses

import pytest

from halos_jax.config import Config, ConfigError, SamplingConfig, TrainConfig
from halos_jax.data.conversations import make_target_items
from halos_jax.data.lengths import (
    Cuts,
    Lengths,
    Tally,
    cut_response,
    fit_response,
    is_truncated,
    make_lengths,
)
from halos_jax.data.tokenize import (
    make_answer_items,
    make_controlled_items,
    make_pair_items,
    make_scored_items,
    make_unpaired_items,
)
from halos_jax.types import (
    FINISH_LENGTH,
    FINISH_STOP,
    Completion,
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)


class LetterRenderer:
    """One token a letter, a header behind the prompt and a marker behind the answer."""

    def render_prompts(self, prompts, max_length):
        for turns in prompts:
            yield self.render_prompt(turns, max_length)

    def render_prompt(self, turns, max_length):
        text = "".join(turn.content for turn in turns)
        return (*map(ord, text), 1)[-max_length:]

    def render_responses(self, texts):
        for text, finished in texts:
            yield (*map(ord, text), *((0,) if finished else ()))

    def render_response(self, text, *, finished=True):
        return next(self.render_responses([(text, finished)]))

    def render_prefix(self, text):
        return tuple(map(ord, text))


RENDERER = LetterRenderer()


def prompt(text, name="p"):
    return Prompt(name, (Turn("user", text),), place="x.jsonl line 3")


def answer(text):
    return Completion((Turn("assistant", text),))


def sample(text, number, output):
    return Sample(prompt(text, text), number, output, (), (), FINISH_STOP, reward=1.0)


def test_the_config_gives_the_lengths():
    config = Config(
        train=TrainConfig(max_length=9, mask_truncated=True),
        sampling=SamplingConfig(max_prompt_length=5),
    )
    assert make_lengths(config, 7) == Lengths(5, 9, True, 7)
    assert make_lengths(config).positions == 0


def test_a_tally_by_hand():
    tally = Tally()
    for length in (3, 5, 1823, 4):
        tally.add(length, 4)
    assert tally == Tally(4, 2, 1823)
    assert tally.describe("prompts") == "2 of 4 prompts (50 %, the longest has 1,823 tokens)"
    tally = Tally()
    tally.add(7, 0)
    assert tally == Tally(1, 0, 7)


# Prompts of 3 and 8 tokens with the header, of which 4 are allowed; answers of 3 and 7 with the
# marker, of which 8 less the prompt fit: of the three sequences 3+3, 3+7, 4+3 one is cut.
SHORT, LONG = "ab", "abcdefg"
EXPECTED = Cuts(prompts=Tally(2, 1, 8), wholes=Tally(3, 1, 10), sequences=Tally(3, 2, 8))
TRIPLES = [(SHORT, "xy"), (SHORT, "xyzxyz"), (LONG, "xy")]


def make_limits() -> Lengths:
    return Lengths(4, 8, positions=6)


@pytest.mark.parametrize(
    "make, records",
    [
        (make_unpaired_items, [Judgement(prompt(p), answer(a), True) for p, a in TRIPLES]),
        (make_answer_items, [Judgement(prompt(p), answer(a), True) for p, a in TRIPLES]),
        (make_target_items, [Demonstration(prompt(p), answer(a)) for p, a in TRIPLES]),
        (
            make_scored_items,
            [sample(SHORT, 0, "xy"), sample(SHORT, 1, "xyzxyz"), sample(LONG, 0, "xy")],
        ),
    ],
)
def test_every_kind_of_item_counts_what_is_cut(make, records):
    lengths = make_limits()
    make(records, RENDERER, lengths)
    assert lengths.cuts == EXPECTED


def test_pairs_and_controlled_answers_count_what_is_cut():
    lengths = make_limits()
    pairs = [
        Preference(prompt(SHORT), answer("xy"), answer("xyzxyz")),
        Preference(prompt(LONG), answer("xy"), answer("")),
    ]
    make_pair_items(pairs, RENDERER, lengths)
    assert lengths.cuts.prompts == EXPECTED.prompts and lengths.cuts.wholes == Tally(4, 1, 10)
    lengths = make_limits()
    judged = [Judgement(prompt(p), answer(a), True) for p, a in TRIPLES]
    make_controlled_items(judged, RENDERER, lengths, ("+", "-"))
    # The control token is one of the four tokens of a prompt.
    assert lengths.cuts.prompts == Tally(2, 1, 9) and lengths.cuts.wholes == Tally(3, 1, 11)


@pytest.mark.parametrize("question, over", [("ab", 0), ("abc", 1)])
def test_a_control_token_counts_against_the_limit_that_is_said(question, over):
    lengths = make_limits()
    judged = [Judgement(prompt(question), answer("xy"), True)]
    (item,) = make_controlled_items(judged, RENDERER, lengths, ("+", "-"))
    assert len(item.prompt_ids) == 4
    assert lengths.cuts.prompts == Tally(1, over, 4 + over)  # longer than 4: one that is cut


def test_what_came_as_tokens_was_counted_where_it_was_sampled():
    lengths = make_limits()
    one = dataclasses.replace(sample(LONG, 0, ""), prompt_ids=(1,) * 4, response_ids=(2, 3))
    make_scored_items([one], RENDERER, lengths)
    assert lengths.cuts == Cuts(sequences=Tally(1, 0, 6), wholes=Tally(1, 0, 6))


def test_each_cut_is_one_line_with_its_share_and_what_to_set(caplog):
    lengths = make_limits()
    lengths.report("x.jsonl")
    assert not caplog.records
    make_target_items([Demonstration(prompt(p), answer(a)) for p, a in TRIPLES], RENDERER, lengths)
    lengths.report("x.jsonl")
    first, second, third = [record.message for record in caplog.records]
    assert first == (
        "x.jsonl: 1 of 2 prompts (50 %, the longest has 8 tokens) are longer than "
        "sampling.max_prompt_length=4: they lose their beginning"
    )
    assert second.startswith(
        "x.jsonl: 1 of 3 answers (33.3 %, the longest has 10 tokens) do not fit train.max_length=8 "
        "with their prompts: they lose their end"
    )
    assert third.startswith(
        "x.jsonl: 2 of 3 sequences (66.7 %, the longest has 8 tokens) go beyond the 6 positions"
    )


def test_a_response_is_cut_to_the_room_behind_its_prompt():
    lengths = Lengths(4, 6)
    assert cut_response((5, 6, 7), 4, lengths).tolist() == [5, 6]
    assert lengths.cuts == Cuts()  # only what is trained on counts
    assert fit_response((5, 6), 4, lengths).tolist() == [5, 6] and lengths.cuts.wholes.over == 0
    with pytest.raises(ConfigError) as caught:
        fit_response((5,), 6, lengths, "x.jsonl line 3")
    assert str(caught.value) == (
        "train.max_length: got 6, but the prompt of x.jsonl line 3 has 6 tokens, which leaves none "
        "for its response; raise it, or lower sampling.max_prompt_length, now 4, which holds for "
        "every task"
    )


def test_truncated_is_what_any_limit_has_cut_and_counts_where_it_is_masked():
    whole, cut = answer("a"), dataclasses.replace(answer("a"), finish_reason=FINISH_LENGTH)
    masked, kept = Lengths(4, 8, mask_truncated=True), Lengths(4, 8)
    assert is_truncated(masked, cut, (1, 2), [1, 2]) and is_truncated(masked, whole, (1, 2), [1])
    assert not is_truncated(masked, whole, (1, 2), [1, 2])
    assert not is_truncated(kept, cut, (1, 2), [1])
