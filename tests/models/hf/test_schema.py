"""The door of config.json: every field has its kind, every wrong value a line, nothing is lost."""

import ast
import math
from pathlib import Path

import pytest

from halos_jax.models import gating
from halos_jax.models.hf import families, rope_fields
from halos_jax.models.hf import family_table as table
from halos_jax.models.hf import fields as hf_fields
from halos_jax.models.hf.families import ModelError, make_decoder_config
from halos_jax.models.hf.schema import (
    FIELDS,
    READERS,
    ROPE,
    check_fields,
    is_read,
    list_unread,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 256,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
WRONG = [
    *(True, False, None, "x", "", "16", [], {}, [None], [[]], {"a": 1}, [True], ["x", 1]),
    *(0, -1, 1.5, -0.5, 3.0, math.nan, math.inf, -math.inf, 10**30, -(10**400), 1e300, 1e-300),
]
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")


def make(family, **fields):
    name = table.FAMILIES[family].language_model
    more = {"moe_intermediate_size": 12} if family == "qwen3_moe" else {}
    return {"model_type": family, "architectures": [name], **SIZES, **more, **fields}


def find_names(module):
    """Return the names that a reader takes from a config, by subscript or `get`."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        value, key = None, None
        if isinstance(node, ast.Subscript):
            value, key = node.value, node.slice
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
            value, key = node.func.value, node.args[0]
        if getattr(value, "id", "") in ("hf_config", "rope") and isinstance(key, ast.Constant):
            found.add(key.value)
    return found


def test_every_field_that_a_reader_reads_has_its_kind():
    found = set.union(*map(find_names, (families, gating, hf_fields, table, rope_fields)))
    assert {"hidden_act", "rope_theta", "sliding_window", "gating_temperature"} <= found
    assert found - FIELDS.keys() - ROPE.keys() == set()
    assert {*hf_fields._SIZES.values(), *gating._SIZES.values()} <= FIELDS.keys()
    of_rope = {name for kind in rope_fields.ROPE_FIELDS.values() for name, _ in kind.values()}
    assert of_rope - {LENGTHS[0]} <= ROPE.keys()
    defaults = {name for family in table.FAMILIES.values() for name in family.defaults}
    assert defaults | READERS.keys() <= FIELDS.keys()
    assert {family for readers in READERS.values() for family in readers} <= table.FAMILIES.keys()


@pytest.mark.parametrize("family", table.FAMILIES)
def test_wrong_values_are_named_and_never_a_traceback(family):
    make_decoder_config(make(family))
    for name, kind in FIELDS.items():
        for value in WRONG:
            errors = []
            checked = check_fields({name: value}, errors)
            assert (name in checked) == kind.fits(value) == (not errors)
            try:
                make_decoder_config(make(family) | {name: value})
                accepted = True
            except ModelError as error:
                accepted = False
                assert kind.fits(value) or f"{name}: got " in str(error)
            read = is_read(name, make(family) | {name: value})
            assert not accepted or kind.fits(value) or not read, (name, value)


@pytest.mark.parametrize("family", table.FAMILIES)
def test_what_a_family_does_not_read_may_be_anything_and_is_named(family):
    for name in READERS:
        if is_read(name, make(family)):
            continue
        for value in (None, 0, "x", -1.5, [None], 8):
            config = make(family) | {name: value}
            assert make_decoder_config(config) == make_decoder_config(make(family)), (name, value)
            named = value and family not in READERS[name]
            assert list_unread(config) == ([f"{name} = {value!r}"] if named else [])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "smollm3"])
def test_a_window_that_is_not_used_may_be_anything(family):
    unused = {"use_sliding_window": False, "sliding_window": 0, "max_window_layers": None}
    assert make_decoder_config(make(family) | unused) == make_decoder_config(make(family))
    assert list_unread(make("qwen2") | unused) == []
    with pytest.raises(ModelError, match="sliding_window: got 0, allowed: an integer from 1"):
        make_decoder_config(make(family) | unused | {"use_sliding_window": True})


@pytest.mark.parametrize("kind", rope_fields.ROPE_FIELDS)
def test_wrong_values_of_a_rope_are_named(kind):
    whole = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4.0}
    whole |= {"short_factor": [1.0], "long_factor": [2.0], LENGTHS[1]: 64}
    config = make("llama", head_dim=2, max_position_embeddings=64)
    make_decoder_config(config | {"rope_scaling": whole})
    for name, one in ROPE.items():
        for value in WRONG:
            for field in ("rope_scaling", "rope_parameters"):
                try:
                    make_decoder_config(config | {field: whole | {name: value}})
                    assert one.fits(value), (name, value)
                except ModelError as error:
                    assert one.fits(value) or f"{field}.{name}: got " in str(error)
    nested = make("gemma3_text") | {"rope_parameters": {"full_attention": {"rope_theta": math.nan}}}
    with pytest.raises(ModelError, match=r"rope_parameters.full_attention.rope_theta: got nan, a"):
        make_decoder_config(nested)


def test_messages_say_what_is_allowed_and_come_together():
    config = make("qwen2", hidden_size=True, rope_theta=math.nan, rms_norm_eps=-1)
    config |= {"tie_word_embeddings": "no", "layer_types": [1], "vocab_size": 10**30}
    with pytest.raises(ModelError) as caught:
        make_decoder_config(config)
    for line in (
        "hidden_size: got True, allowed: an integer from 1 to 16,777,216",
        "rope_theta: got nan, allowed: a number above 1, 1e+15 at most, or null",
        "rms_norm_eps: got -1, allowed: a number above 0, 1 at most",
        "tie_word_embeddings: got 'no', allowed: true or false, or null",
        "layer_types: got [1], allowed: a list of strings, or null",
        f"vocab_size: got {10**30}, allowed: an integer from 1 to 268,435,456",
    ):
        assert f"\n  {line}\n" in str(caught.value)
    assert "got None" not in str(caught.value)  # of what has been named


def test_what_is_not_read_is_listed():
    config = make("llama", num_key_value_head=8, attention_dropout=0.1, use_cache=True)
    config |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": [1, 2]}}
    assert list_unread(config) == [
        "num_key_value_head = 8",
        "attention_dropout = 0.1",
        "rope_scaling.alpha = [1, 2]",
    ]
    assert list_unread(make("llama", attention_dropout=0.0, bos_token_id=1)) == []
    gemma = make("gemma3_text", attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    assert list_unread(gemma) == ["attn_logit_softcapping = 50.0"]
    assert list_unread(gemma | {"model_type": "gemma2"}) == []


@pytest.mark.parametrize("family", table.FAMILIES)
def test_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    sizes = make(family)
    rest = {name: value for name, value in sizes.items() if name != "model_type"}
    theirs = transformers.AutoConfig.for_model(family, **rest).to_dict()
    assert make_decoder_config(theirs) == make_decoder_config(sizes)
    assert list_unread(theirs) == []
