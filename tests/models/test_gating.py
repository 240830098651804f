"""ArmoRM's head against a reading of the published model in torch, on random weights."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.config import ModelConfig
from halos_jax.models import decoder, gating
from halos_jax.models.files import export, hf
from halos_jax.models.hf.families import ModelError, make_decoder_config
from halos_jax.packing.batches import build_batch, plan_batches, split_scores
from halos_jax.types import MEMBER, Item

OBJECTIVES, END = 5, (50, 51, 52)
HF_CONFIG = {
    "architectures": ["LlamaForRewardModelWithGating"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "num_objectives": OBJECTIVES,
    "gating_hidden_dim": 12,
    "gating_n_hidden": 2,
    "gating_temperature": 3.0,
    "gating_token_pattern": list(END),
    "id2label": {str(label): f"LABEL_{label}" for label in range(OBJECTIVES)},
}


def make_tensors(dtype=np.float32):
    """Return a random checkpoint of HF_CONFIG under the published names, [out, in]."""
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (61, 16),
        "model.norm.weight": (16,),
        "regression_layer.weight": (OBJECTIVES, 16),
        "reward_transform_matrix": (OBJECTIVES, OBJECTIVES),
        "gating.logit_scale": (1,),
    }
    for layer, (size, inner) in enumerate([(12, 16), (12, 12), (OBJECTIVES, 12)]):
        shapes[f"gating.layers.{layer}.weight"] = (size, inner)
        shapes[f"gating.layers.{layer}.bias"] = (size,)
    projections = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    mlp = {"gate": (20, 16), "up": (20, 16), "down": (16, 20)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{k}_proj.weight": s for k, s in projections.items()}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (16,)
    return {name: (0.4 * random.normal(size=s)).astype(dtype) for name, s in shapes.items()}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "armo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    save_file(make_tensors(), folder / "model.safetensors")
    return folder


def make_items():
    """Two prompts with two and three responses; the second prompt has the end's tokens inside."""
    random = np.random.default_rng(1)

    def draw(*sizes):
        return [random.integers(3, 49, size).astype(np.int32) for size in sizes]

    first = np.concatenate([*draw(7), END]).astype(np.int32)
    second = np.concatenate([*draw(4), END, *draw(5), END]).astype(np.int32)
    return [
        Item(first, tuple(draw(6, 3)), (MEMBER,) * 2),
        Item(second, tuple(draw(1, 4, 9)), (MEMBER,) * 3),
    ]


def load(folder, mesh):
    settings = ModelConfig(params_dtype="float32", compute_dtype="float32")
    config = hf.load_decoder_config(str(folder), settings)
    return hf.load_params(str(folder), config, mesh), config


def score_packed(params, config, rows=1):
    """Return the scores of `make_items`, prompt by prompt, from packed rows."""
    items = make_items()
    plan = plan_batches(items, batch_size=2, num_rows=rows, tokens_per_row=64, row_multiple=8)
    batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
    scores = jax.jit(functools.partial(decoder.compute_scores, config=config))(params, batch)
    found = dict(split_scores(plan, 0, items, np.asarray(scores)[None]))
    return [list(found[item]) for item in sorted(found)]


def score_by_torch(folder):
    """The published computation, sequence by sequence, over transformers' LlamaModel."""
    torch = pytest.importorskip("torch")
    import transformers

    tensors = {name: torch.tensor(x) for name, x in load_file(folder / "model.safetensors").items()}
    config = transformers.LlamaConfig(**HF_CONFIG)
    backbone = transformers.LlamaModel(config).eval()
    prefix = "model."
    own = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
    backbone.load_state_dict(own)
    scores = []
    for item in make_items():
        scores.append([])
        for response in item.responses:
            ids = [*item.prompt_ids.tolist(), *response.tolist()]
            starts = [at for at in range(len(ids)) if tuple(ids[at : at + len(END)]) == END]
            with torch.no_grad():
                states = backbone(torch.tensor([ids])).last_hidden_state[0]
                rewards = tensors["regression_layer.weight"] @ states[-1]
                gate = states[starts[-1]]
                for layer in range(3):
                    name = f"gating.layers.{layer}"
                    gate = tensors[f"{name}.weight"] @ gate + tensors[f"{name}.bias"]
                    gate = gate.clamp(min=0) if layer < 2 else gate
                gate = (gate / 3.0).softmax(0) * tensors["gating.logit_scale"]
                scores[-1].append(float(gate @ (rewards @ tensors["reward_transform_matrix"])))
    return scores


def test_scores_equal_the_published_computation(model, mesh1):
    expected = score_by_torch(model)
    found = score_packed(*load(model, mesh1))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    # Read one token later, the gate gives something else.
    params, config = load(model, mesh1)
    moved = dataclasses.replace(config.gating, prompt_end=END[1:])
    other = score_packed(params, dataclasses.replace(config, gating=moved))
    for got, wanted in zip(other, found, strict=True):
        assert np.abs(np.subtract(got, wanted)).min() > 1e-4


def test_any_mesh_and_packing_gives_the_same_scores(model, mesh, mesh1):
    with jax.set_mesh(mesh1):
        expected = score_packed(*load(model, mesh1))
    sharded = score_packed(*load(model, mesh), rows=4)
    for got, wanted in zip(sharded, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_objectives_and_weights_are_given(model, mesh1):
    params, config = load(model, mesh1)
    items = make_items()
    plan = plan_batches(items, batch_size=2, num_rows=1, tokens_per_row=64, row_multiple=8)
    batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
    hidden = decoder.encode_batch(params, batch, config)
    rewards, weights = gating.compute_objectives(params, hidden, batch, config.gating)
    real = batch.sequences.weight[0] > 0
    assert rewards.shape == weights.shape == (*batch.sequences.last.shape, OBJECTIVES)
    scale = float(make_tensors()["gating.logit_scale"][0])
    np.testing.assert_allclose(weights[0][real].sum(-1), scale, rtol=1e-5)
    # The responses of a prompt share its weights, and no rewards.
    groups = batch.sequences.group[0][real]
    for group in set(groups.tolist()):
        of_prompt = np.asarray(weights[0][real])[groups == group]
        np.testing.assert_allclose(of_prompt, of_prompt[:1].repeat(len(of_prompt), 0), rtol=1e-5)
    assert len(np.unique(np.asarray(rewards[0][real]).round(5), axis=0)) == 5


def test_an_export_has_the_same_tensors_and_config(model, tmp_path, mesh):
    params, config = load(model, mesh)
    export.save_model(params, config, tmp_path / "out", source=model)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in HF_CONFIG} == HF_CONFIG


def test_broken_heads_are_refused(model, mesh1):
    tensors = make_tensors()
    del tensors["gating.logit_scale"]
    tensors["gating.layers.3.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(model, mesh1)
    assert "gating.logit_scale: missing" in str(caught.value)
    assert "gating.layers.3.weight: unexpected" in str(caught.value)
    broken = HF_CONFIG | {"gating_n_hidden": "x", "gating_temperature": 0}
    (model / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ModelError) as caught:
        load(model, mesh1)
    assert "gating_n_hidden: got 'x', allowed: an integer from 1 to 4,096" in str(caught.value)
    assert "gating_temperature: got 0, allowed: a number above 0" in str(caught.value)


def test_the_published_config_is_read():
    published = HF_CONFIG | {"gating_temperature": 10, "gating_n_hidden": 3, "num_objectives": 19}
    del published["gating_token_pattern"], published["gating_hidden_dim"]
    config = make_decoder_config(published)
    assert config.num_labels == 1 and config.gating.num_objectives == 19
    assert config.gating.prompt_end == (128009, 128006, 78191, 128007, 271)
    assert config.gating.hidden_dim == 1024 and config.gating.temperature == 10
