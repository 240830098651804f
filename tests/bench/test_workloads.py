"""The benchmark's cases: the shapes are the published ones, the items those that were asked for."""

import dataclasses

import numpy as np
import pytest

from halos_jax.bench.workloads import (
    CASES,
    get_case,
    load_lengths,
    make_decoder,
    make_items,
)
from halos_jax.config import ModelConfig, SamplingConfig
from halos_jax.models.spec import count_params
from halos_jax.packing.transforms import NO_SETS, measure_kept
from halos_jax.types import MEMBER, MISMATCHED, TARGET


@pytest.mark.parametrize(
    ("name", "params"), [("dpo_1b_full", 1_235_814_400), ("decode_8b", 8_030_261_248)]
)
def test_the_models_have_the_size_of_the_published_ones(name, params):
    assert count_params(make_decoder(CASES[name], ModelConfig())) == params


def test_items_have_the_lengths_of_the_case():
    full = make_items(CASES["dpo_1b_full"], steps=2, vocab_size=100)
    assert len(full) == 32
    assert {(len(i.prompt_ids), *map(len, i.responses)) for i in full} == {(512, 512, 512)}
    real = make_items(CASES["dpo_1b_real"], steps=1, vocab_size=100)
    assert [(len(i.prompt_ids), *map(len, i.responses)) for i in real] == list(load_lengths()[:64])
    assert all(
        ids.min() >= 3 and ids.max() < 100 for i in real for ids in (i.prompt_ids, *i.responses)
    )
    np.testing.assert_array_equal(
        real[5].prompt_ids, make_items(CASES["dpo_1b_real"], steps=1, vocab_size=100)[5].prompt_ids
    )


def test_kto_items_are_of_both_classes_with_a_mismatched_answer():
    items = make_items(get_case("kto_1b_real", tiny=True), steps=1, vocab_size=100)
    assert {item.roles for item in items} == {(TARGET, MISMATCHED)}
    assert {item.desirable for item in items} == {True, False}


def test_the_tiny_variant_is_the_same_case_at_a_smaller_size():
    for name, case in CASES.items():
        tiny = get_case(name, tiny=True)
        assert (tiny.kind, tiny.loss, tiny.samples) == (case.kind, case.loss, case.samples)
        assert tiny.model == "tiny" and tiny.examples <= 16


def test_lengths_are_fixed_or_drawn_from_real_pairs():
    assert CASES["decode_1b"].fixed_lengths == (128, 256)
    with pytest.raises(ValueError, match="lengths: got 'real'"):
        _ = CASES["dpo_1b_real"].fixed_lengths


def test_groups_say_what_they_were_drawn_from_where_that_is_measured():
    case = get_case("dapo_1b_full", tiny=True)
    plain = make_items(case, steps=1, vocab_size=100)
    assert all(one.roles == (MEMBER, MEMBER) and not one.drawn for one in plain)
    sampling = SamplingConfig(exact_ratios=True, temperature=0.7, top_p=0.9, max_kept=16)
    items = make_items(case, steps=1, vocab_size=100, sampling=sampling)
    assert measure_kept(items) == 16
    for item in items:
        for ids, drawn in zip(item.responses, item.drawn, strict=True):
            table = drawn.tabulate(16)
            assert (table == ids[:, None]).sum() == len(
                ids
            ) and 0 <= table.min() <= table.max() < 100
    heat = make_items(
        case, steps=1, vocab_size=100, sampling=dataclasses.replace(sampling, top_p=1.0)
    )
    assert measure_kept(heat) == NO_SETS
