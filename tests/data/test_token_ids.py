"""Ids that no token has are refused with their place, whatever the kind of record."""

import numpy as np
import pytest

from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.records.fields import RecordError
from halos_jax.data.token_ids import check_ids
from halos_jax.drawn import Drawn
from halos_jax.types import (
    Completion,
    Demonstration,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)
from tests.data.chat.test_template import TEMPLATES, make_tokenizer

PROMPT = Prompt("p", (Turn("user", "q"),), place="a.jsonl line 7")


@pytest.fixture(scope="module")
def renderer():
    return make_renderer(make_tokenizer(TEMPLATES["chatml"]), [900])


def answer(ids=(1, 2)):
    return Completion((Turn("assistant", "a"),), ids)


def draw_from(ids):
    return Drawn(0.7, (-0.5,), (len(ids),), np.array(sorted(ids), "<i4").tobytes())


@pytest.mark.parametrize("wrong", [400, 2**31 - 1])
@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda ids: Sample(PROMPT, 0, "a", ids, (1,), "stop"), "'prompt_ids'"),
        (lambda ids: Sample(PROMPT, 0, "a", (1,), ids, "stop"), "'response_ids'"),
        (
            lambda ids: Sample(PROMPT, 0, "a", (1,), (1,), "stop", drawn=draw_from(ids)),
            "'drawn.kept_ids'",
        ),
        (lambda ids: Preference(PROMPT, answer(), answer(), ids), "'prompt_ids'"),
        (lambda ids: Preference(PROMPT, answer(ids), answer()), "'ids_A or ids_B'"),
        (lambda ids: Preference(PROMPT, answer(), answer(ids)), "'ids_A or ids_B'"),
        (lambda ids: Judgement(PROMPT, answer(ids), True), "'response_ids'"),
        (lambda ids: Demonstration(PROMPT, answer(), ids), "'prompt_ids'"),
    ],
)
def test_an_id_without_a_token_is_refused_with_its_place(renderer, make, field, wrong):
    largest = max(renderer.tokenizer.get_vocab().values())
    good = make((0, largest, 900))  # an end token of the model's counts as known
    check_ids([good, make(())], renderer)
    with pytest.raises(RecordError, match=rf"^a.jsonl line 7: field {field}: got the id {wrong},"):
        check_ids([good, make((1, wrong, 2))], renderer)


def test_records_with_other_ids_can_be_left_out(renderer):
    def make(ids):
        return Sample(PROMPT, 0, "a", (1,), ids, "stop")

    errors = []
    found = check_ids([make((1,)), make((1, 400)), make((2,))], renderer, errors.append)
    assert found == [make((1,)), make((2,))]
    assert len(errors) == 1 and "got the id 400" in str(errors[0])
