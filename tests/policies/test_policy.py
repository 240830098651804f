"""A run's start: the tokens that it adds have rows, in its first run and in the next."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    RewardConfig,
)
from halos_jax.data.chat.loading import load_renderer
from halos_jax.losses import get_loss
from halos_jax.models import lora
from halos_jax.models.files import hf
from halos_jax.policies import final
from halos_jax.policies import policy as policies
from halos_jax.policies.policy import find_policy, load_frozen, load_start, start_policy
from halos_jax.tasks import launch
from halos_jax.training.loop import make_trainer
from halos_jax.types import Turn
from halos_jax.workdir.interrupt import StopSignal

ADDED = ("<|good|>", "<|bad|>")


def load_policy(settings):
    policy = find_policy(settings)
    return policy.decoder, policy.renderer


def test_without_added_tokens_nothing_changes(toy):
    settings = ModelConfig(path=str(toy / "policy"))
    decoder, renderer = load_policy(settings)
    assert decoder == hf.load_decoder_config(settings.path, settings)
    own = load_renderer(settings.path)
    assert renderer.fingerprint == own.fingerprint and renderer.stop_ids == own.stop_ids


def test_added_tokens_travel_to_the_next_run(toy, tmp_path, mesh1):
    settings = ModelConfig(path=str(toy / "policy"), added_tokens=ADDED)
    decoder, renderer = load_policy(settings)
    before = load_renderer(settings.path).tokenizer.get_vocab()
    ids = renderer.tokenizer.convert_tokens_to_ids(list(ADDED))
    assert renderer.new_tokens == ADDED and decoder.new_rows == tuple(ids)
    assert min(ids) > max(before.values()) and decoder.vocab_size >= max(ids) + 1
    assert renderer.render_prefix("<|bad|><|good|>") == (ids[1], ids[0])

    params = hf.load_or_init_params(settings, decoder, mesh1, 0)
    params["embed"] = params["embed"].at[np.array(ids)].add(1.0)  # as if trained
    final.export_final(params, find_policy(settings), tmp_path)
    path = str(tmp_path / "final")
    turns = (Turn("user", "cab<|good|>"),)
    for tokenizer in ("", path, str(toy / "policy")):
        again = dataclasses.replace(settings, path=path, tokenizer=tokenizer)
        read, own = load_policy(again)
        assert own.new_tokens == () and read.new_rows == ()
        assert own.render_prompt(turns, 20) == renderer.render_prompt(turns, 20)
        loaded = hf.load_or_init_params(again, read, mesh1, 0)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert load_renderer(path).fingerprint == renderer.fingerprint


def test_the_end_tokens_are_the_model_s(toy, tmp_path):
    """A tokenizer of one's own does not say when the model stops; its config does without one."""
    model = tmp_path / "model"
    model.mkdir()
    for file in (toy / "policy").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    settings = ModelConfig(path=str(model), tokenizer=str(toy / "policy"))
    _, renderer = load_policy(settings)
    own = load_renderer(str(toy / "policy")).tokenizer.eos_token_id
    assert renderer.stop_ids >= {3, 5, own}
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert 7 in load_policy(settings)[1].stop_ids


def test_the_template_is_found_in_both_of_its_places(toy, tmp_path):
    template = load_renderer(str(toy / "policy")).template.replace("{% else %}", "{% else %}sort ")
    for path in (toy / "policy").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_policy(ModelConfig(path=str(tmp_path)))[1].template == template
    (tmp_path / "chat_template.jinja").unlink()
    config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_policy(ModelConfig(path=str(tmp_path)))[1].template == template


def test_a_model_with_a_gate_is_no_policy(toy, tmp_path):
    config = json.loads((toy / "policy" / "config.json").read_text())
    config["architectures"] = ["LlamaForRewardModelWithGating"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf.ModelError, match=r"model with a gating network; allowed: a language"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_a_policy_knows_which_rows_of_its_vocabulary_have_no_token(toy, tmp_path):
    shutil.copytree(toy / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    settings = json.loads(file.read_text())
    size = settings["vocab_size"]
    file.write_text(json.dumps(settings | {"vocab_size": size + 9}))
    policy = start_policy(Config(model=ModelConfig(path=str(tmp_path / "policy"))))
    rows = {row for start, stop in policy.decoder.unknown_rows for row in range(start, stop)}
    assert rows == set(range(size + 9)) - policy.renderer.token_ids
    assert rows >= set(range(size, size + 9))


def load(config, mesh, **changes):
    """Return the trainer of `config` with its frozen part, and the params it starts from."""
    policy = start_policy(config)
    policy = dataclasses.replace(policy, decoder=dataclasses.replace(policy.decoder, **changes))
    frozen = load_frozen(policy, mesh)
    loss = get_loss({"name": "dpo"})
    trainer = make_trainer(config, policy.decoder, loss, mesh, total_steps=1, frozen=frozen)
    return trainer, load_start(policy, mesh, frozen)


def test_without_lora_the_params_are_the_model(toy, mesh1):
    trainer, params = load(Config(model=ModelConfig(path=str(toy / "policy"))), mesh1)
    assert trainer.frozen is None
    assert params.keys() == {"embed", "final_norm", "head", "layers"}


def test_a_base_is_quantized_as_the_config_says(toy, mesh1, monkeypatch):
    asked = []
    monkeypatch.setattr(lora, "quantize_base", lambda base, kind: asked.append(kind) or base)
    for kind in ("compute", "int8", "nf4"):
        settings = LoraConfig(rank=2, base=kind)
        load(Config(model=ModelConfig(path=str(toy / "policy")), lora=settings), mesh1)
    assert asked == ["int8", "nf4"]


def test_lora_starts_from_the_same_fresh_adapter_each_time(toy, mesh1):
    config = Config(model=ModelConfig(path=str(toy / "policy")), lora=LoraConfig(rank=2), seed=4)
    trainer, params = load(config, mesh1, num_labels=1)
    # The base is held as it is computed with; what is trained, the new score head too, is float32.
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainer.frozen.base)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert trainer.frozen.adapter.dropout == 0.05 and trainer.frozen.adapter.seed == 4
    assert params.keys() == {"layers", "score"}
    _, again = load(config, mesh1, num_labels=1)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    of_seed = lora.init_adapter(4, trainer.frozen, trainer.decoder, mesh1)
    jax.tree.map(np.testing.assert_array_equal, of_seed, params)
    _, other = load(dataclasses.replace(config, seed=5), mesh1, num_labels=1)
    assert (other["layers"]["q_lora_a"] != params["layers"]["q_lora_a"]).all()
    assert jax.tree.structure(trainer.abstract_state.params) == jax.tree.structure(params)


def test_lora_starts_from_an_exported_adapter(toy, tmp_path, mesh1):
    settings = ModelConfig(path=str(toy / "policy"), compute_dtype="float32")
    config = Config(model=settings, lora=LoraConfig(rank=2, alpha=6.0, targets=("q_proj",)))
    trainer, params = load(config, mesh1)
    moved = jax.tree.map(lambda x: x + 0.1, params)
    final.export_final(moved, start_policy(config), tmp_path, frozen=trainer.frozen)
    # The adapter says what it is; only the dropout is this run's to choose.
    path = str(tmp_path / "final" / "adapter")
    again = dataclasses.replace(config, lora=LoraConfig(path=path, dropout=0.1))
    other, found = load(again, mesh1)
    jax.tree.map(np.testing.assert_array_equal, found, moved)
    expected = dataclasses.replace(trainer.frozen.adapter, dropout=0.1)
    assert other.frozen.adapter == expected
    # What stands around the adapter is the merged model.
    exported = hf.load_params(str(tmp_path / "final"), other.decoder, mesh1)
    merged = lora.merge_adapter(found, other.frozen)
    for name, leaf in merged["layers"].items():
        taken = lora.take_layer(leaf, 0, "float32")
        np.testing.assert_array_equal(taken, exported["layers"][name][0])


def test_new_tokens_of_a_frozen_base_are_warned_of(toy, mesh1, caplog):
    settings = ModelConfig(path=str(toy / "policy"), added_tokens=ADDED)
    load(Config(model=settings, lora=LoraConfig(rank=2)), mesh1)
    assert "rows of the 2 new tokens belong to the frozen base and are not trained" in caplog.text


@pytest.mark.parametrize("task", ["online", "sft", "align", "sample", "eval", "feedback"])
def test_a_classifier_is_no_policy(toy, tmp_path, task):
    """Said before its weights are read: there are none here."""
    model = tmp_path / "model"
    model.mkdir()
    for file in (toy / "policy").iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    plain = json.loads((model / "config.json").read_text())
    plain |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (model / "config.json").write_text(json.dumps(plain))
    source = str(toy / ("prompts.jsonl" if task in ("online", "sample", "eval") else "sft.jsonl"))
    config = Config(
        task="eval" if task == "feedback" else task,
        workdir=str(tmp_path / "run"),
        progress=False,
        model=ModelConfig(path=str(model)),
        reward=RewardConfig(kind="function", function="halos_jax.data.toy:score_by_rule"),
        data=DataConfig(train=source, eval=source if task in ("eval", "feedback") else ""),
        eval=EvalConfig(on="feedback" if task == "feedback" else "samples"),
    )
    with pytest.raises(ConfigError) as caught:
        launch.run_task(config, StopSignal())
    assert str(caught.value) == (
        f"model.path: got '{model}', a model that scores texts and writes none; allowed: a causal "
        "language model; a reward model goes to --config.reward.path"
    )


def test_a_reference_is_loaded_by_the_seed_and_the_adapter_of_its_run(toy, monkeypatch):
    """Its rows of new tokens and the base's dtype are the run's, its architecture the policy's."""
    model = ModelConfig(path=str(toy / "policy"), added_tokens=ADDED, compute_dtype="bfloat16")
    run = Config(task="align", model=model, seed=11, lora=LoraConfig(rank=4))
    found = find_policy(ModelConfig(path=str(toy / "policy"), compute_dtype="float32"), seed=3)
    wide = dataclasses.replace(found.decoder, remat="none", d_mlp=7)
    found = dataclasses.replace(found, decoder=wide)
    seen = []
    monkeypatch.setattr(policies, "load_frozen", lambda policy, mesh: seen.append(policy) or "base")
    monkeypatch.setattr(policies, "load_start", lambda *given: seen.append(given) or "start")
    loaded = policies.load_reference(found, "mesh", path="", run=run)
    assert loaded == ("start", "base")
    policy, given = seen
    assert given == (policy, "mesh", "base")
    assert (policy.seed, policy.lora, policy.settings) == (11, run.lora, model)
    assert (policy.decoder.d_mlp, policy.decoder.compute_dtype) == (7, "float32")
    assert len(policy.decoder.new_rows) == 2 and policy.base_dtype == "bfloat16"
    # A path wins, and is what its own seed makes of it.
    monkeypatch.setattr(policies, "load_trained", lambda policy, mesh: (policy, mesh))
    policy, mesh = policies.load_reference(found, "mesh", path=str(toy / "base"), run=run)
    assert (policy.settings.path, policy.seed, mesh) == (str(toy / "base"), 3, "mesh")
    assert policy.decoder is wide


def test_a_policy_with_a_head_keeps_the_labels_that_it_has(toy):
    policy = find_policy(ModelConfig(path=str(toy / "policy")))
    assert policy.with_head().decoder.num_labels == 1
    two = dataclasses.replace(policy.decoder, num_labels=2)
    assert dataclasses.replace(policy, decoder=two).with_head().decoder.num_labels == 2
    with pytest.raises(ConfigError, match=r"model\.path: got 'here', a model that scores texts"):
        policy.with_head().refuse_classifier("here")
