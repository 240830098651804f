"""Rotary embeddings of config.json: every spelling, two that contradict, and what is refused."""

import math

import numpy as np
import pytest

from halos_jax.models.attention import rope as rotary
from halos_jax.models.hf.rope_fields import (
    FULL,
    WINDOWED,
    check_rotation,
    read_rope,
    read_two_ropes,
)
from halos_jax.models.spec import RopeConfig

LINEAR = {"rope_type": "linear", "factor": 8.0}


def read(reader, config, **options):
    errors = []
    return reader(config, errors, **options), errors


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, RopeConfig(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(1e4, "linear", 2.0)),
        ({"partial_rotary_factor": 0.5}, RopeConfig(fraction=0.5)),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, RopeConfig(fraction=0.25)),
    ],
)
def test_rope_in_every_spelling(config, expected):
    assert read(read_rope, config) == (expected, [])


def test_yarn_takes_the_length_of_the_model_and_its_own_temperature():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    rope, errors = read(read_rope, {"rope_scaling": yarn, "max_position_embeddings": 512})
    assert errors == [] and rope.original_max_length == 512
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    said = yarn | {"original_max_position_embeddings": 64, "attention_factor": 0.5}
    rope, _ = read(read_rope, {"rope_scaling": said, "max_position_embeddings": 512})
    assert (rope.original_max_length, rope.attention_factor) == (64, 0.5)
    mixed = yarn | {"mscale": 2.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
    rope, _ = read(read_rope, {"rope_scaling": mixed})
    expected = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert rope.attention_factor == pytest.approx(expected)


def test_two_ropes_in_both_spellings():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    new = {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            WINDOWED: {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    expected = {"rope": RopeConfig(1e6, "linear", 8.0), "local_rope": RopeConfig(1e4)}
    assert read(read_two_ropes, old) == read(read_two_ropes, new) == (expected, [])
    one_base, _ = read(read_two_ropes, {"rope_theta": 5e5, "rope_scaling": old["rope_scaling"]})
    assert one_base["local_rope"] == RopeConfig(5e5)
    _, errors = read(read_two_ropes, {"rope_scaling": {"type": "spiral"}})
    assert len(errors) == 1


def test_unknown_and_unfinished_ropes_are_refused():
    _, errors = read(read_rope, {"rope_scaling": {"type": "spiral", "factor": 2.0}})
    kinds = "'default', 'linear', 'llama3', 'yarn', 'longrope', 'dynamic'"
    assert errors == [f"rope type: got 'spiral', allowed: {kinds}"]
    _, errors = read(read_rope, {"rope_scaling": {"rope_type": "yarn"}})
    assert errors == [
        "rope of type 'yarn': factor missing",
        "rope of type 'yarn': original_max_position_embeddings missing",
    ]
    llama3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 |= {"low_freq_factor": 4.0, "high_freq_factor": 4.0}
    _, errors = read(read_rope, {"rope_scaling": llama3})
    (line,) = errors
    assert line.endswith("high_freq_factor: got 4.0, allowed: more than low_freq_factor = 4.0")


# --------------------------------------------------------------------------- two that contradict


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_theta": 1e4, **LINEAR}, {"type": "linear", "factor": 8}),
        ({"rope_theta": 1e4, "rope_type": "default"}, {"rope_type": "default"}),
    ],
)
def test_both_spellings_may_say_the_same(new, old):
    both = {"rope_parameters": new, "rope_scaling": old, "rope_theta": 1e4}
    assert read(read_rope, both) == read(read_rope, {"rope_parameters": new})


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_theta": 1e4, "rope_type": "default"}, LINEAR),
        ({"rope_theta": 1e4, **LINEAR}, {**LINEAR, "factor": 4.0}),
        # transformers would take theta from outside, where it is not.
        ({"rope_theta": 5e5, **LINEAR}, LINEAR),
    ],
)
def test_two_that_contradict_are_refused(new, old):
    _, errors = read(read_rope, {"rope_parameters": new, "rope_scaling": old})
    assert errors == [
        "rope_scaling: got another one than rope_parameters, allowed: one of the two, or the same "
        "in both (transformers takes rope_scaling alone)"
    ]


def test_two_ropes_that_contradict_are_refused():
    nested = {FULL: {"rope_theta": 1e6, "rope_type": "default"}, WINDOWED: {"rope_theta": 1e4}}
    _, errors = read(read_two_ropes, {"rope_parameters": nested, "rope_scaling": LINEAR})
    assert errors == [
        "rope_scaling: got another one than rope_parameters.full_attention, allowed: one of the "
        "two, or the same in both"
    ]
    same = {**nested, FULL: {"rope_theta": 1e6, **LINEAR}}
    got, errors = read(read_two_ropes, {"rope_parameters": same, "rope_scaling": LINEAR})
    assert errors == [] and got["rope"] == RopeConfig(1e6, "linear", 8.0)


def test_one_for_all_layers_and_one_a_type_of_layer_are_not_taken_for_each_other():
    _, errors = read(read_rope, {"rope_parameters": {FULL: LINEAR, WINDOWED: {}}})
    assert errors == [
        "rope_parameters: got 'full_attention' in it, allowed: one embedding for all layers"
    ]
    _, errors = read(read_two_ropes, {"rope_parameters": LINEAR})
    assert errors == [
        "rope_parameters: got 'rope_type' in it, allowed: 'full_attention' and "
        "'sliding_attention', an object for each type of layer"
    ]


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_original_length_is_that_of_the_config_then_of_the_rope_then_the_models(kind):
    rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = "original_max_position_embeddings"
    for said, config, expected in (
        ({original: 16}, {original: 32}, 32),
        ({original: 16}, {original: None}, 16),
        ({original: None}, {}, 64),
        ({}, {}, 64),
    ):
        config |= {"max_position_embeddings": 64, "rope_scaling": rope | said}
        got, errors = read(read_rope, config)
        assert errors == [] and got.original_max_length == expected


# --------------------------------------------------------------------------- up to a length

LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 30.0]}
PHI = {"hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 512}


def test_longrope_has_its_short_factors_up_to_its_original_length():
    phi = PHI | {"original_max_position_embeddings": 64, "rope_scaling": LONG}
    got, errors = read(read_rope, phi)
    assert errors == [] and (got.kind, got.factors, got.longest) == ("longrope", (1.0, 1.5), 64)
    assert got.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)))
    expected = np.float32([1.0, 1e4**-0.5 / 1.5])
    np.testing.assert_allclose(rotary.inverse_frequencies(got, 4), expected, rtol=1e-6)
    # A name that the family has for it; what the config says counts before what the rope does.
    su = phi | {"rope_scaling": LONG | {"type": "su", "original_max_position_embeddings": 7}}
    assert read(read_rope, su, renamed={"su": "longrope"}) == (got, [])
    inside = LONG | {"original_max_position_embeddings": 64, "attention_factor": 1.25}
    got, errors = read(read_rope, PHI | {"rope_scaling": inside})
    assert errors == [] and (got.longest, got.attention_factor) == (64, 1.25)
    unsaid, _ = read(read_rope, PHI | {"rope_scaling": LONG})
    assert (unsaid.longest, unsaid.attention_factor) == (512, 1.0)


def test_longrope_has_a_factor_for_each_pair():
    phi = PHI | {"rope_scaling": LONG | {"short_factor": [1.0], "long_factor": [1.0] * 3}}
    _, errors = read(read_rope, phi)
    assert errors == [
        f"rope of type 'longrope': {name}: got {count} numbers, allowed: 2, one for each pair of "
        "rotated dimensions"
        for name, count in (("short_factor", 1), ("long_factor", 3))
    ]
    half = phi | {"head_dim": 6, "partial_rotary_factor": 0.67}
    half["rope_scaling"] = LONG
    assert read(read_rope, half)[1] == []


def test_dynamic_scaling_is_none_up_to_the_models_own_length():
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500.0}
    got, errors = read(read_rope, dynamic | {"max_position_embeddings": 64})
    assert errors == [] and got == RopeConfig(500.0, longest=64)
    _, errors = read(read_rope, dynamic)
    assert errors == ["rope of type 'dynamic': max_position_embeddings missing"]


@pytest.mark.parametrize(
    ("head_dim", "fraction", "rotated"), [(5, 1.0, 5), (1, 1.0, 1), (8, 0.1, 0)]
)
def test_a_head_is_rotated_in_pairs(head_dim, fraction, rotated):
    errors = []
    check_rotation(head_dim, [RopeConfig(fraction=fraction)] * 2, errors)
    (line,) = errors
    assert line.startswith(f"head_dim: got {head_dim}, of which {rotated} are rotated, allowed: 1")
    check_rotation(8, [RopeConfig(fraction=0.25), RopeConfig(fraction=0.5), RopeConfig()], errors)
    assert len(errors) == 1
