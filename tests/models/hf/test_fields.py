"""Readers of config.json: RoPE in every spelling, windows, and what is refused."""

import math

import pytest

from halos_jax.models.hf.fields import (
    FULL,
    WINDOWED,
    get_layer_types,
    read_architecture,
    read_clamped_gate,
    read_unrotated,
    read_windows,
)
from halos_jax.models.spec import ClampedGate, RopeConfig

SIZES = {
    "vocab_size": 11,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}


def read(reader, config, *rest, **options):
    errors = []
    return reader(config, errors, *rest, **options), errors


def test_the_architecture_of_a_bare_config():
    fields, errors = read(read_architecture, SIZES)
    assert errors == []
    assert (fields["num_kv_heads"], fields["head_dim"], fields["d_mlp"]) == (4, 4, 20)
    assert fields["activation"] == "silu" and not fields["tie_embeddings"]
    assert not fields["qkv_bias"] and fields["rope"] == RopeConfig()
    biased, _ = read(read_architecture, SIZES | {"attention_bias": True, "hidden_act": "gelu_new"})
    assert biased["qkv_bias"] and biased["out_bias"] and not biased["mlp_bias"]
    assert biased["activation"] == "gelu_tanh"


def test_every_bad_size_is_named():
    _, errors = read(read_architecture, {"vocab_size": 0, "hidden_act": "prelu"})
    assert [line.split(":")[0] for line in errors] == [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
    ]
    _, errors = read(read_architecture, SIZES | {"num_key_value_heads": 3})
    assert "num_key_value_heads: got 3, allowed: a divisor of num_attention_heads = 4" in errors


def test_windows_follow_the_layer_types():
    config = SIZES | {"sliding_window": 5}
    types = get_layer_types(config, lambda layer: layer > 0)
    assert types == [FULL, WINDOWED, WINDOWED]
    assert read(read_windows, config, types) == ((0, 5, 5), [])
    assert read(read_windows, config, [FULL] * 3) == ((), [])
    written = config | {"layer_types": [WINDOWED, FULL, FULL]}
    assert get_layer_types(written, lambda layer: True) == [WINDOWED, FULL, FULL]


@pytest.mark.parametrize(
    ("window", "types", "message"),
    [
        (5, [FULL, "chunked_attention", WINDOWED], "layer_types: got chunked_attention, allowed:"),
        (5, [WINDOWED], "layer_types: got 1 of them, allowed: one for each layer"),
        (None, [WINDOWED] * 3, "sliding_window: got None, allowed: a positive integer"),
        (0, [WINDOWED] * 3, "sliding_window: got 0, allowed: a positive integer"),
    ],
)
def test_windows_that_cannot_be(window, types, message):
    _, (line,) = read(read_windows, SIZES | {"sliding_window": window}, types)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"no_rope_layers": [1, 0, 1, 0]}, (False, True, False)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, (False, False, True)),
        ({"no_rope_layers": [1, 1, 1]}, (False, False, False)),
    ],
)
def test_layers_without_rotary_embedding(config, expected):
    assert read(read_unrotated, SIZES | config) == (expected, [])


@pytest.mark.parametrize(
    "config",
    [
        {"no_rope_layers": [1, 0]},
        {"no_rope_layers": [1, 2, 1]},
        {"no_rope_layers": "101"},
        {"no_rope_layer_interval": 0},
    ],
)
def test_bad_layers_without_rotary_embedding_are_named(config):
    (name,) = config
    _, (error,) = read(read_unrotated, SIZES | config)
    assert error.startswith(f"{name}: got {config[name]!r}, allowed: ")


def test_a_clamped_gate_has_two_positive_numbers():
    good = {"swiglu_alpha": 1.702, "swiglu_limit": 7}
    assert read(read_clamped_gate, good) == (ClampedGate(1.702, 7.0), [])
    for bad in (0, -1.0, None, True, "7", math.nan):
        found, errors = read(read_clamped_gate, good | {"swiglu_limit": bad})
        assert found is None
        assert errors == [f"swiglu_limit: got {bad!r}, allowed: a number above 0"]
