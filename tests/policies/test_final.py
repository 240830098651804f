"""The export at the end of a run: tokenizer, template and padding fit the model."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from halos_jax.config import ModelConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.policies import final
from halos_jax.policies.policy import Policy
from halos_jax.policies.source import Source
from halos_jax.types import Turn
from halos_jax.workdir.intact import is_complete
from halos_jax.workdir.ledger import no_ledger


def make_policy(settings, decoder, renderer):
    return Policy(Source(settings.path, settings), decoder, renderer)


def export_policy(toy, workdir, settings, renderer):
    config = hf.load_decoder_config(settings.path)
    params = spec.init_params(jax.random.key(1), config)
    workdir.mkdir(parents=True, exist_ok=True)
    return params, final.export_final(params, make_policy(settings, config, renderer), workdir)


def test_the_model_comes_with_its_own_tokenizer(toy, tmp_path):
    settings = ModelConfig(path=str(toy / "policy"))
    assert not is_complete(tmp_path, no_ledger(tmp_path))
    params, folder = export_policy(toy, tmp_path, settings, load_renderer(settings.path))
    assert folder == tmp_path / "final" and is_complete(tmp_path, no_ledger(tmp_path))
    names = {path.name for path in (toy / "policy").iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in names - {"model.safetensors"}:  # its template and its end tokens among them
        assert (folder / name).read_bytes() == (toy / "policy" / name).read_bytes()
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    read = hf.load_params(str(folder), hf.load_decoder_config(str(folder)), mesh)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_weights_are_exported_in_the_dtype_of_those_that_they_came_from(toy, tmp_path, caplog):
    source = tmp_path / "half"
    params = spec.init_params(jax.random.key(1), hf.load_decoder_config(str(toy / "policy")))
    decoder = hf.load_decoder_config(str(toy / "policy"))
    export.save_model(params, decoder, source, source=toy / "policy", dtype="bfloat16")
    settings = ModelConfig(path=str(source))
    policy = make_policy(settings, hf.load_decoder_config(str(source), settings), None)
    with caplog.at_level(logging.INFO):
        assert final.choose_dtype("auto", policy) == "bfloat16"
        assert final.choose_dtype("auto", policy) == "bfloat16"
    assert caplog.text.count("exported in bfloat16") == 1 and "export.dtype=params" in caplog.text
    assert final.choose_dtype("params", policy) == "float32"
    assert final.choose_dtype("float16", policy) == "float16"
    drawn = make_policy(dataclasses.replace(settings, random_init=True), policy.decoder, None)
    assert final.choose_dtype("auto", drawn) == "float32"


def test_a_template_of_the_config_is_exported(toy, tmp_path):
    """Who loads the exported model renders what it was trained on."""
    own = load_renderer(str(toy / "policy"))
    template = own.template.replace("{% else %}", "{% else %}sort ")
    (tmp_path / "own.jinja").write_text(template)
    settings = ModelConfig(path=str(toy / "policy"), chat_template=str(tmp_path / "own.jinja"))
    renderer = load_renderer(settings.path, settings.chat_template)
    _, folder = export_policy(toy, tmp_path / "run", settings, renderer)
    again = load_renderer(str(folder))
    turns = (Turn("user", "cab"),)
    ids = again.render_prompt(turns, 20)
    assert ids == renderer.render_prompt(turns, 20) != own.render_prompt(turns, 20)
    assert again.fingerprint == renderer.fingerprint


def test_a_tokenizer_of_the_config_is_exported(toy, tmp_path):
    """Of the source's tokenizer nothing is left that could contradict the new one."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (toy / "policy").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "special_tokens_map.json").write_text("{}")
    (source / "added_tokens.json").write_text('{"<old>": 5}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    settings = ModelConfig(path=str(source), tokenizer=str(toy / "base"))
    _, folder = export_policy(toy, tmp_path / "run", settings, load_renderer(settings.tokenizer))
    assert not (folder / "added_tokens.json").exists()
    assert not (folder / "additional_chat_templates").exists()
    base = load_renderer(str(toy / "base"))
    assert load_renderer(str(folder)).fingerprint == base.fingerprint


def test_what_ends_answers_and_where_scores_are_read_is_exported(toy, tmp_path):
    """Of a source that says another token, as base models do."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (toy / "policy").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "generation_config.json").write_text('{"eos_token_id": 5, "max_new_tokens": 9}')
    settings, renderer = ModelConfig(path=str(source)), load_renderer(str(source))
    marker = renderer.tokenizer.convert_tokens_to_ids(renderer.end_marker)
    assert marker != 5 and renderer.stop_ids == {5, marker}
    _, folder = export_policy(toy, tmp_path / "policy", settings, renderer)
    made = json.loads((folder / "generation_config.json").read_text())
    assert made == {"eos_token_id": [5, marker], "max_new_tokens": 9}
    assert "halos_jax_read_at" not in json.loads((folder / "config.json").read_text())
    # A classifier that was trained here says so, and ends no generation.
    decoder = dataclasses.replace(hf.load_decoder_config(str(source)), num_labels=1)
    params = spec.init_params(jax.random.key(1), decoder)
    for read_at, mark in (("auto", "end_of_turn"), ("", None)):
        folder = final.export_policy(
            params,
            make_policy(settings, decoder, renderer),
            tmp_path / f"reward{read_at}",
            read_at=read_at,
        )
        config = json.loads((folder / "config.json").read_text())
        assert config.get("halos_jax_read_at") == mark
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 5


def test_nothing_appears_before_it_is_whole(toy, tmp_path, monkeypatch):
    settings = ModelConfig(path=str(toy / "policy"), tokenizer=str(toy / "policy"))

    class Broken:
        pad_id, template = None, ""

        class tokenizer:
            pad_token_id, chat_template = None, ""

            @staticmethod
            def save_pretrained(folder):
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        export_policy(toy, tmp_path, settings, Broken)
    assert not is_complete(tmp_path, no_ledger(tmp_path)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_transformers_scores_a_padded_batch_of_an_exported_classifier(toy, tmp_path, pad):
    """Without a padding token it refuses; with the end marker as one it reads the wrong token."""
    torch = pytest.importorskip("torch")
    import transformers

    source = tmp_path / "source"
    source.mkdir()
    for path in (toy / "policy").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    tokenizer = load_renderer(str(source)).tokenizer
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(source)
    settings, renderer = ModelConfig(path=str(source)), load_renderer(str(source))
    decoder = dataclasses.replace(hf.load_decoder_config(str(source)), num_labels=1)
    params = spec.init_params(jax.random.key(1), decoder)
    folder = final.export_final(params, make_policy(settings, decoder, renderer), tmp_path)
    assert renderer.tokenizer.pad_token == pad  # what the run uses is left alone

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["cab<|im_end|>", "a<|im_end|>", "bacd<|im_end|>"]
    with torch.no_grad():
        batch = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-4, atol=1e-6)
    assert len(set(batch[:, 0].tolist())) == 3
