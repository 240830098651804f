"""The teacher: its vocabulary is the policy's, its rows are as many, its params are its own."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from halos_jax.config import Config, ConfigError, ModelConfig, TrainConfig
from halos_jax.losses import get_loss
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.models.hf.families import ModelError
from halos_jax.policies import teacher as teachers
from halos_jax.policies.policy import start_policy
from halos_jax.sharding import partition_spec

GKD = get_loss({"name": "gkd"})


def make_model(toy, folder, *, rows=0, **changes):
    """Write a model with the toy's tokenizer and `rows` more rows; return its config and params."""
    base = folder.with_name(f"{folder.name}_base")
    shutil.copytree(toy / "base", base)
    plain = json.loads((base / "config.json").read_text())
    plain |= {"vocab_size": plain["vocab_size"] + rows} | changes
    (base / "config.json").write_text(json.dumps(plain))
    config = hf.load_decoder_config(str(base))
    params = spec.init_params(jax.random.key(9), config)
    export.save_model(params, config, folder, source=base)
    return config, params


def make_config(toy, teacher, **model):
    settings = ModelConfig(
        path=str(toy / "policy"), teacher=str(teacher), compute_dtype="float32", **model
    )
    return Config(model=settings, train=TrainConfig(max_length=64), loss={"name": "gkd"})


@pytest.mark.parametrize("rows", [0, 5, 64])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_get_the_policy_s_rows(toy, tmp_path, mesh, rows, tied):
    config, params = make_model(
        toy, tmp_path / "big", rows=rows, num_hidden_layers=3, tie_word_embeddings=tied
    )
    asked = make_config(toy, tmp_path / "big")
    policy = start_policy(asked)
    made = teachers.load_teacher(asked, GKD, policy, mesh)
    words = max(policy.renderer.tokenizer.get_vocab().values()) + 1
    size = policy.decoder.vocab_size
    assert (made.words, made.config.vocab_size, made.config.num_layers) == (words, size, 3)
    assert config.vocab_size == size + rows >= words
    assert ("head" in made.params) != tied
    for name in ("embed", "head")[: 2 - tied]:
        np.testing.assert_allclose(made.params[name], params[name][:size], rtol=1e-6)
        expected = partition_spec(("vocab", "embed"), made.params[name].shape, mesh)
        assert made.params[name].sharding.spec == expected
    jax.tree.map(np.testing.assert_array_equal, made.params["layers"], params["layers"])


def test_a_policy_with_more_rows_than_its_teacher_is_given_rows_of_no_token(toy, tmp_path, mesh1):
    make_model(toy, tmp_path / "padded", rows=7)
    asked = make_config(toy, toy / "policy")
    asked = dataclasses.replace(
        asked, model=dataclasses.replace(asked.model, path=str(tmp_path / "padded"))
    )
    policy = start_policy(asked)
    made = teachers.load_teacher(asked, GKD, policy, mesh1)
    assert len(made.params["embed"]) == policy.decoder.vocab_size == made.config.vocab_size
    assert made.words <= policy.decoder.vocab_size - 7
    assert not np.any(made.params["embed"][-7:]) and np.any(made.params["embed"][-8])


def test_the_teacher_is_held_in_the_compute_dtype(toy, mesh1):
    asked = make_config(toy, toy / "policy")
    asked = dataclasses.replace(
        asked, model=dataclasses.replace(asked.model, compute_dtype="bfloat16")
    )
    policy = start_policy(asked)
    made = teachers.load_teacher(asked, GKD, policy, mesh1)
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jax.numpy.bfloat16.dtype}
    assert policy.decoder.params_dtype == "float32"


def test_only_a_loss_with_a_divergence_has_a_teacher(toy, mesh1):
    asked = make_config(toy, "nowhere")
    policy = start_policy(asked)
    assert teachers.load_teacher(asked, get_loss({"name": "dpo"}), policy, mesh1) is None
    for path, said in (("", "model.teacher: got ''"), ("/no/where", "'/no/where' not found")):
        wrong = make_config(toy, path)
        with pytest.raises((ConfigError, ModelError), match=said):
            teachers.load_teacher(wrong, GKD, policy, mesh1)


def test_a_classifier_or_a_folder_without_tokenizer_is_no_teacher(toy, tmp_path):
    for name in ("classifier", "mute"):
        shutil.copytree(toy / "policy", tmp_path / name)
    file = tmp_path / "classifier" / "config.json"
    plain = json.loads(file.read_text())
    plain |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    file.write_text(json.dumps(plain))
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    for name, said in (
        ("classifier", "model.teacher: got .* a model that scores texts and writes none"),
        ("mute", "model.teacher: got .*mute.*, allowed: .* with a Hugging Face tokenizer"),
    ):
        asked = make_config(toy, tmp_path / name)
        with pytest.raises((ConfigError, ModelError), match=said):
            teachers.describe_teacher(asked, start_policy(asked))


OWN = {"<s>": 0, "a": 1, "b": 2, "c": 3}


def test_a_vocabulary_may_have_more_behind_the_policy_s_own_only():
    teachers.compare_vocabularies(OWN, OWN, "big")
    teachers.compare_vocabularies(OWN, OWN | {"<tool>": 4, "<other>": 9}, "big")
    beyond = {"<s>": 0, "b": 1, "c": 3, "x": 2, "y": 7}
    with pytest.raises(ConfigError) as caught:
        teachers.compare_vocabularies(OWN, beyond, "big")
    assert str(caught.value).startswith(
        "model.teacher: got 'big', whose tokenizer is not the policy's: it lacks 'a'; it has "
        "besides 'x'; it has under other ids 'b' (1, not 2); allowed: a model with the same tokens"
    )
    with pytest.raises(ConfigError, match="it lacks '0', '1', '2' and 17 more; it has besides"):
        numbers = {str(number): number for number in range(20)}
        teachers.compare_vocabularies(numbers, {"a": 0}, "big")


def test_tokens_that_the_policy_adds_must_be_the_teacher_s_too(toy):
    asked = make_config(toy, toy / "policy", added_tokens=("<|new|>",))
    with pytest.raises(ConfigError, match=r"it lacks '<\|new\|>'; allowed"):
        teachers.describe_teacher(asked, start_policy(asked))
