"""A run's start: the tokens that it adds have rows, in its first run and in the next."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from halos_jax.config import ModelConfig
from halos_jax.data.chat import load_renderer
from halos_jax.models import hf
from halos_jax.rounds import final
from halos_jax.rounds.start import load_policy
from halos_jax.types import Turn

ADDED = ("<|good|>", "<|bad|>")


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
    final.export_final(params, decoder, settings, renderer, tmp_path)
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
