"""The door of adapter_config.json: every field of a wrong type and every variant is one line."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from halos_jax.models.files import peft
from halos_jax.models.files.adapter_schema import FIELDS, REQUIRED, list_faults
from halos_jax.models.hf.families import ModelError, make_decoder_config
from halos_jax.models.hf.family_table import FAMILIES

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False}
PLAIN |= {"target_modules": ["q_proj"], "base_model_name_or_path": "x", "use_dora": False}
WRONG = [
    *(True, False, None, "x", [], {}, [1], ["x", 1], {"a": 1}, 0, -1, 1, 1.5, math.nan),
    *(math.inf, 10**30, -(10**400)),
]
# What a value of each required field may be.
RIGHT = {"r": [1], "lora_alpha": [1, 1.5]}


def test_a_plain_adapter_has_no_faults():
    assert list(list_faults(PLAIN)) == []
    assert list(list_faults({"r": 1, "lora_alpha": 0.5})) == []


def test_required_numbers_are_numbers():
    for name, kind in REQUIRED.items():
        for value in WRONG:
            faults = list(list_faults(PLAIN | {name: value}))
            right = any(type(value) is type(one) and value == one for one in RIGHT[name])
            assert kind.fits(value) == right == (not faults), (name, value)
            assert right or faults[0].startswith(f"{name}: got ")
        rest = {key: value for key, value in PLAIN.items() if key != name}
        assert list(list_faults(rest)) == [f"{name}: got null, allowed: {kind.allowed}"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_other_field_has_its_type(name):
    for value in WRONG:
        faults = list(list_faults(PLAIN | {name: value}))
        assert FIELDS[name].fits(value) == (not faults)
        assert not faults or faults[0].startswith(f"{name}: got ")


def test_flags_are_no_numbers_and_numbers_no_flags():
    for field, value in {"init_lora_weights": 1, "use_rslora": 0, "use_dora": 0, "r": True}.items():
        (line,) = list_faults(PLAIN | {field: value})
        assert line.startswith(f"{field}: got {value!r}, allowed: ")


def test_a_variant_that_is_not_known_is_refused_unless_it_is_off():
    for off in (None, False, {}, []):
        assert list(list_faults(PLAIN | {"use_next_lora": off, "rank_pattern": off})) == []
    lines = list(list_faults(PLAIN | {"use_next_lora": True, "rank_pattern": {"q_proj": 8}}))
    assert lines == [
        "use_next_lora: got True, allowed: false or null",
        "rank_pattern: got {'q_proj': 8}, allowed: false or null",
    ]


def test_fields_of_peft_are_known_or_off_by_default():
    peft_library = pytest.importorskip("peft")
    made = peft_library.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    written = json.loads(json.dumps(made, default=list))
    assert list(list_faults(written)) == []


def test_an_adapter_of_nothing_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    config = make_decoder_config({"model_type": "llama", "num_attention_heads": 2, **sizes})
    for tensors, got in (({}, "no tensors"), ({"x": np.ones(2)}, "got x,")):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=rf"{got}.* allowed: an adapter of linear layers"):
            peft.read_adapter(str(tmp_path), config, FAMILIES["llama"], dropout=0.0, seed=0)
