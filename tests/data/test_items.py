"""Every kind of item from the records of its feedback, in every shape that these come in."""

import json
import logging

import numpy as np
import pytest

from halos_jax.data.datasets import load_judgements, load_scored
from halos_jax.data.items import load_items, warn_of_classes
from halos_jax.data.lengths import Lengths
from halos_jax.data.records.fields import Edits, RecordError
from halos_jax.data.selection import Selection
from halos_jax.errors import UserError
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item


class LetterRenderer:
    """A renderer whose tokens are the letters' code points."""

    def render_prompt(self, turns, max_length):
        return tuple(map(ord, turns[-1].content[-max_length:]))

    def render_response(self, text, *, finished=True):
        return (*map(ord, text), *((0,) if finished else ()))

    def render_prompts(self, prompts, max_length):
        return (self.render_prompt(turns, max_length) for turns in prompts)

    def render_responses(self, texts):
        return (self.render_response(text, finished=finished) for text, finished in texts)

    def render_prefix(self, text):
        return tuple(map(ord, text))


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def save(tmp_path):
    def write(records) -> str:
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        return str(tmp_path / "data.jsonl")

    return write


PAIRS = [
    {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
    for number in range(3)
]
LABELS = [
    {"prompt": f"question {number}", "completion": f"answer {number}", "label": number == 0}
    for number in range(3)
]
SCORES = [
    {
        "type": "scalar_feedback",
        "prompt_id": str(number // 2),
        "prompt": "question",
        "sample_id": number,
        "output": f"answer {number}",
        "reward": number,
    }
    for number in range(4)
]


@pytest.mark.parametrize(
    ("kind", "rows", "roles", "count"),
    [
        ("pair", PAIRS, (CHOSEN, REJECTED), 3),
        ("target", PAIRS, (TARGET,), 3),
        ("unpaired", PAIRS, (TARGET, MISMATCHED), 6),
        ("controlled", PAIRS, (TARGET,), 6),
        ("unpaired", LABELS, (TARGET, MISMATCHED), 3),
        ("answer", SCORES, (MEMBER, MEMBER), 2),
        ("answer", LABELS, (MEMBER,), 3),
        ("answer", PAIRS, (MEMBER,), 6),
        ("group", SCORES, (MEMBER, MEMBER), 2),
        ("output", PAIRS, (TARGET,), 6),
        ("output", LABELS, (TARGET,), 3),
        ("output", [*SCORES, *SCORES], (TARGET,), 8),
    ],
)
def test_each_kind_of_item(tmp_path, kind, rows, roles, count):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    items = load_items(kind, str(file), LetterRenderer(), Lengths(16, 32))
    assert len(items) == count and all(item.roles == roles for item in items)
    one = load_items(kind, str(file), LetterRenderer(), Lengths(16, 32), Selection(limit=1))
    assert 0 < len(one) < count


def test_an_answer_has_the_reward_of_its_score_or_of_its_label(save):
    def rewards(rows):
        items = load_items("answer", save(rows), LetterRenderer(), Lengths(16, 32))
        return [item.rewards for item in items]

    assert rewards(SCORES) == [(0.0, 1.0), (2.0, 3.0)]
    assert rewards(LABELS) == [(1.0,), (-1.0,), (-1.0,)]
    # A label counts for more than the reward that it was made of.
    labelled = [row | {"type": "binary_feedback", "reward": 7.0, "label": 0} for row in SCORES[:1]]
    labelled[0]["prompt"] = [turn("user", "question")]
    labelled[0]["output"] = [turn("assistant", "answer")]
    assert rewards(labelled) == [(-1.0,)]


@pytest.mark.parametrize("kind", ["pair", "target", "unpaired", "group"])
def test_tokens_of_another_model_are_refused(save, kind):
    class Decoding(LetterRenderer):
        token_ids = frozenset(range(300))

        def decode_response(self, ids):
            return "".join(chr(token) for token in ids if token)

    def write(shift):
        def say(text):
            return [ord(letter) + shift for letter in text + ", stop"]  # cut at a stop string

        sides = {"ids_A": say("good 0"), "ids_B": say("bad")}
        pair = {"prompt": "q", "output_A": "good 0", "output_B": "bad", "label": 1, **sides}
        scores = [one | {"response_ids": say(one["output"])} for one in SCORES]
        return save(scores if kind == "group" else [pair])

    def load(source, **options):
        return load_items(kind, source, Decoding(), Lengths(32, 64), **options)

    assert load(write(0), check_tokens=True)
    foreign = write(1)
    assert load(foreign)  # a run knows whose its own are
    with pytest.raises(RecordError, match=r"mean '.* but the text beside them is '(good|answer) 0"):
        load(foreign, check_tokens=True)
    beyond = write(1000)
    with pytest.raises(RecordError, match=r"line 1: field '.*ids.*': got the id 1\d\d\d, which no"):
        load(beyond, check_tokens=True)


def make_judged(desirable, undesirable):
    labels = [True] * desirable + [False] * undesirable
    return [Item(np.ones(1, int), (np.ones(1, int),), (TARGET,), desirable=one) for one in labels]


@pytest.mark.parametrize(
    "counts, expected",
    [
        ((19, 1), None),
        ((1, 19), None),
        ((20, 1), "data: 1 of 21 answers (4.8 %) are undesirable, too few to learn from; add some, "
         "or keep fewer others by data.frac_unique_desirable"),
        ((0, 3), "data: 0 of 3 answers (0.0 %) are desirable, too few to learn from; add some, or "
         "keep fewer others by data.frac_unique_undesirable"),
        ((3, 0), "0 of 3 answers (0.0 %) are undesirable"),
    ],
)  # fmt: skip
def test_a_class_that_is_missing_or_small_is_said(caplog, counts, expected):
    warn_of_classes(make_judged(*counts), "data")
    assert (expected in caplog.text) if expected else not caplog.text


def test_records_of_another_kind_are_one_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, LABELS)))
    for kind in ("pair", "group"):
        with pytest.raises(RecordError, match=r"rows\.jsonl line 1: field"):
            load_items(kind, str(file), LetterRenderer(), Lengths(16, 32))


class KnowingRenderer(LetterRenderer):
    """It knows the tokens below 300, and plain texts, which have no tokens around them."""

    token_ids = frozenset(range(300))
    template = "{{ messages }}"

    def render_texts(self, texts):
        return (tuple(map(ord, text)) for text in texts)

    def show(self, turns):
        return turns[-1].content

    def decode_response(self, ids):
        return "".join(map(chr, ids))


def test_answers_that_say_nothing_are_said(save, caplog):
    records = [PAIRS[0], PAIRS[1] | {"chosen": " "}, PAIRS[2] | {"chosen": "a", "rejected": "a"}]
    source = save(records)
    arguments = ("pair", source, KnowingRenderer(), Lengths(16, 32))
    assert len(load_items(*arguments, check_tokens=True)) == 3
    assert f"{source}: 1 answers have no text: a model that learns one learns to end" in caplog.text
    assert f"{source}: 1 of 3 pairs have two equal answers, which say nothing" in caplog.text
    caplog.clear()
    load_items(*arguments)  # of a run's own samples, its reward decides
    assert not caplog.messages


IDS = {"type": "sample", "prompt_id": "p", "sample_id": 0, "prompt": "q", "output": "ab"}
GOOD_IDS = IDS | {"response_ids": [97, 98]}


@pytest.mark.parametrize(
    "kind, good, bad, message",
    [
        ("target", {"text": "ab"}, {"text": "a"}, "field 'text': got 1 tokens, allowed: two or"),
        ("target", GOOD_IDS, IDS | {"response_ids": [97, 300]}, "got the id 300, which no token"),
        ("target", GOOD_IDS, GOOD_IDS | {"prompt_ids": [9] * 40}, "has 40 tokens, which leaves"),
        ("pair", PAIRS[0], {"prompt": "q", "chosen": "a"}, "field 'rejected'"),
    ],
)
def test_a_bad_record_is_named_or_left_out_and_counted(save, caplog, kind, good, bad, message):
    def load(records, skip):
        selection = Selection(edits=Edits(skip=skip))
        arguments = (kind, save(records), KnowingRenderer(), Lengths(16, 32), selection)
        return load_items(*arguments, check_tokens=True)

    with pytest.raises(UserError, match=f"data.jsonl line 2.*{message}"):
        load([good, bad, good], skip=False)
    assert len(load([good, bad, good], skip=True)) == 2
    (line,) = [one for one in caplog.messages if "left out" in one]
    assert "1 bad records are left out (data.skip_bad), 2 are " in line and message in line
    with pytest.raises(RecordError, match=r"data\.jsonl: .*(leaves out all|nothing to train on)"):
        load([bad, bad], skip=True)


# --------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, [("a", True)]),
        ({"prompt": "q", "response": "a", "label": 0}, [("a", False)]),
        (
            {
                "prompt": [turn("user", "q")],
                "completion": [turn("assistant", "a")],
                "label": False,
            },
            [("a", False)],
        ),
        (
            {
                "type": "binary_feedback",
                "prompt_id": "p",
                "prompt": [turn("user", "q")],
                "output": [turn("assistant", "a")],
                "label": 1,
                "reward": 0.5,
            },
            [("a", True)],
        ),
        (
            {"type": "binary_feedback", "instruction": "q", "output": "a", "label": 1, "x": 1}
            | {"prompt": "q"},
            [("a", True)],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("a", True), ("b", False)]),
        (
            {
                "type": "pairwise_feedback",
                "prompt": "q",
                "output_A": [turn("assistant", "a")],
                "output_B": [turn("assistant", "b")],
                "label": 0,
            },
            [("b", True), ("a", False)],
        ),
    ],
)
def test_judgement_shapes(save, record, expected):
    judgements = load_judgements(save([record]))
    assert [(one.completion.turns[0].content, one.desirable) for one in judgements] == expected
    assert {one.prompt.turns[-1].content for one in judgements} == {"q"}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q", "completion": "a"}, "label"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label"),
        ({"prompt": "q", "label": True}, "completion"),
        ({"completion": "a", "label": True}, "prompt"),
    ],
)
def test_bad_judgements_are_errors(save, record, field):
    good = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(RecordError, match=f"line 2: field '{field}': got"):
        load_judgements(save([good, record]))


def test_scored_samples_are_loaded_and_others_counted(save, caplog):
    rows = [
        {"type": kind, "prompt_id": "p", "prompt": "q", "output": "a", "sample_id": number}
        for number, kind in enumerate(["scalar_feedback", "sample", "sample"])
    ]
    rows[0]["reward"], rows[2]["reward"] = 1, -0.5
    with caplog.at_level(logging.INFO):
        samples = load_scored(save(rows))
    assert [(one.sample_id, one.reward) for one in samples] == [(0, 1.0), (2, -0.5)]
    assert "2 samples, 1 without a reward" in caplog.text
    with pytest.raises(RecordError, match="nothing to train on"):
        load_scored(save(rows[1:2]))
