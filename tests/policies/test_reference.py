"""The reference of a run: what it started from, or a model of its own in its own architecture."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from halos_jax.config import Config, ConfigError, LoraConfig, ModelConfig, TrainConfig
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.models.hf.families import ModelError
from halos_jax.policies.policy import load_frozen, load_start, start_policy
from halos_jax.policies.reference import attach_reference, count_room, load_sft


def make_config(toy, reference, rank=0, **model):
    settings = {"compute_dtype": "bfloat16", "path": str(toy / "policy"), **model}
    settings["reference"] = str(reference) if reference else ""
    return Config(
        model=ModelConfig(**settings), train=TrainConfig(max_length=64), lora=LoraConfig(rank)
    )


def find(config):
    return attach_reference(start_policy(config), config)


def make_deeper(toy, folder):
    """Write a model of the toy's family with 3 layers; return its params."""
    base = folder.with_name("deeper_base")
    shutil.copytree(toy / "base", base)
    plain = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
    (base / "config.json").write_text(json.dumps(plain))
    config = hf.load_decoder_config(str(base))
    params = spec.init_params(jax.random.key(9), config)
    export.save_model(params, config, folder, source=base)
    return params


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_without_one_the_reference_is_what_training_starts_from(toy, mesh1):
    config = make_config(toy, "")
    policy = start_policy(config)
    assert attach_reference(policy, config) is policy and count_room(policy, mesh1) == 0
    assert_equal(load_sft(policy, mesh1, None), load_start(policy, mesh1, None))


def test_the_model_itself_as_its_reference_is_the_same_to_the_bit(toy, mesh1):
    policy = find(make_config(toy, toy / "policy", added_tokens=("<new>",)))
    own = load_start(policy, mesh1, None)
    assert len(own["embed"]) == policy.decoder.vocab_size == policy.reference.decoder.vocab_size
    assert_equal(load_sft(policy, mesh1, None), own)
    assert count_room(policy, mesh1) == 0


def test_a_reference_may_have_another_architecture(toy, tmp_path, mesh1):
    params = make_deeper(toy, tmp_path / "deeper")
    policy = find(make_config(toy, tmp_path / "deeper"))
    assert (policy.decoder.num_layers, policy.reference.decoder.num_layers) == (1, 3)
    assert_equal(load_sft(policy, mesh1, None), params)
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    assert count_room(policy, mesh1) == 4 * layers * 2 // 3  # two layers more, in float32


def test_beside_an_adapter_it_is_a_whole_model_in_the_compute_dtype(toy, mesh1):
    policy = find(make_config(toy, toy / "policy", rank=2))
    frozen = load_frozen(policy, mesh1)
    params = load_sft(policy, mesh1, frozen)
    assert_equal(params, frozen.base)  # which is the model that the policy is an adapter of
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    # Without it the base is there already.
    assert count_room(policy, mesh1) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_what_is_no_reference_is_refused_by_name(toy, tmp_path, short):
    for name in ("classifier", "mute", "foreign"):
        shutil.copytree(toy / "policy", tmp_path / name)
    file = tmp_path / "classifier" / "config.json"
    plain = json.loads(file.read_text())
    plain |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    file.write_text(json.dumps(plain))
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    file = tmp_path / "foreign" / "tokenizer.json"
    plain = json.loads(file.read_text())
    words = plain["model"]["vocab"]
    first, second = sorted(words, key=words.__getitem__)[10:12]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(plain))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"task": "sft", "workdir": "run"}')
    for path, said in (
        (tmp_path / "classifier", "a model that scores texts and writes none; allowed: a causal"),
        (tmp_path / "mute", "mute', allowed: .* with a Hugging Face tokenizer"),
        (tmp_path / "foreign", "whose tokenizer is not the policy's: it has under other ids"),
        (tmp_path / "run", "is the workdir of a run that has not finished"),
        ("/no/where", "'/no/where' not found"),
    ):
        config = make_config(toy, path)
        with pytest.raises((ConfigError, ModelError), match=said) as caught:
            find(config)
        assert str(caught.value).startswith("model.reference: ")
    config = dataclasses.replace(make_config(toy, short.path), train=TrainConfig(max_length=64))
    with pytest.raises(ModelError, match=r"train.max_length \(model.reference\)"):
        find(config)
