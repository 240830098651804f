"""Every family against transformers in float32: logits, decoding, gradients, scores, files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from halos_jax.config import ModelConfig
from halos_jax.models import cache as caches
from halos_jax.models import decoder
from halos_jax.models.attention import rope
from halos_jax.models.files import export, hf
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.types import TARGET, Item
from tests.logits import compute_logits

VOCAB, LENGTH, TOLERANCE = 61, 24, 1e-4
LENGTHS = np.array([24, 17, 9])  # of the rows
PREFILLED = np.array([6, 10, 3])  # tokens of each row that are prefilled; the rest is decoded

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED, MULTI_QUERY = {"num_key_value_heads": 2}, {"num_key_value_heads": 1}
DEEP = {"num_hidden_layers": 3}


def scaled(kind, theta=500.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "factor": 4.0, **fields}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 1.0} | {
    "short_factor": [1.0, 1.1, 1.4, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
TYPES = ["sliding_attention", "full_attention"]

# Family -> its configs; gradients and the round trip are those of the first.
CASES = {
    "llama": [
        GROUPED | scaled("llama3", **LLAMA3, **ORIGINAL),
        MULTI_QUERY | scaled("linear") | {"head_dim": 10, "tie_word_embeddings": True},
        scaled("yarn", **ORIGINAL) | {"attention_bias": True, "mlp_bias": True},
        scaled(
            "yarn", beta_fast=8.0, beta_slow=2.0, attention_factor=0.7, truncate=False, **ORIGINAL
        )
        | {"original_max_position_embeddings": 32},  # counts before the rope's
        GROUPED | scaled("dynamic"),
    ],
    "mistral": [
        GROUPED | {"sliding_window": 5},
        MULTI_QUERY | {"sliding_window": 1, "head_dim": 12},
        GROUPED | {"sliding_window": None, "tie_word_embeddings": True},
        GROUPED | {"sliding_window": 64},  # wider than any sequence
    ],
    "qwen2": [
        GROUPED,
        MULTI_QUERY | {"tie_word_embeddings": True},
        GROUPED | DEEP | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ],
    "qwen3": [
        GROUPED | {"head_dim": 12},
        MULTI_QUERY | {"head_dim": 8, "attention_bias": True},
        GROUPED
        | DEEP
        | {"head_dim": 8, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 6, "layer_types": [*TYPES, TYPES[0]]},
    ],
    "mixtral": [
        GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2},
        MULTI_QUERY | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6},
        GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ],
    "qwen3_moe": [
        GROUPED
        | {"head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}
        | {"moe_intermediate_size": 20},
        MULTI_QUERY
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        GROUPED
        | {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 8, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5, "moe_intermediate_size": 8},
    ],
    "gemma2": [
        GROUPED | {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7},
        MULTI_QUERY
        | {
            "head_dim": 8,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "num_hidden_layers": 3,
        }
        | {"final_logit_softcapping": 3.0},
        GROUPED
        | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "layer_types": TYPES[::-1]},
    ],
    "gemma3_text": [
        GROUPED | {"head_dim": 12, "sliding_window": 5, "layer_types": TYPES},
        MULTI_QUERY
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": [*TYPES, TYPES[0]],
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,  # which transformers does not apply
        },
        GROUPED
        | {"head_dim": 8, "sliding_window": 6, "layer_types": [*TYPES, "full_attention"]}
        | {"num_hidden_layers": 3, "final_logit_softcapping": 3.0, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 8.0},
            }
        },
    ],
    "gpt_neox": [
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        {"attention_bias": False, "num_hidden_layers": 3}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
    "olmo2": [
        GROUPED,
        MULTI_QUERY | {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-3, "num_hidden_layers": 3},
    ],
    "olmo3": [
        GROUPED | {"sliding_window": 5, "layer_types": TYPES},
        MULTI_QUERY | {"sliding_window": 4, "num_hidden_layers": 4, "tie_word_embeddings": True},
        GROUPED
        | {"sliding_window": 6, "layer_types": TYPES[::-1], "rope_theta": 900.0}
        | {"rope_scaling": scaled("yarn", **ORIGINAL)["rope_parameters"]},
    ],
    "gpt_oss": [
        GROUPED
        | {"head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5}
        | {"swiglu_limit": 0.4},
        MULTI_QUERY
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 3}
        | {"num_hidden_layers": 3, "attention_bias": False, "swiglu_alpha": 0.9}
        | {"layer_types": [TYPES[1], TYPES[0], TYPES[0]]}
        | scaled("yarn", **ORIGINAL),
        GROUPED
        | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 1}
        | {"layer_types": [TYPES[1]] * 2, "tie_word_embeddings": True}
        | scaled("linear"),
    ],
    "smollm3": [
        GROUPED | {"no_rope_layers": [1, 0]},
        MULTI_QUERY
        | {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "tie_word_embeddings": False}
        | {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True}
        | scaled("yarn", **ORIGINAL),
        GROUPED
        | {"no_rope_layers": [0, 1, 1, 1], "sliding_window": 6, "mlp_bias": True}
        | {"use_sliding_window": True, "layer_types": TYPES[::-1]},
    ],
    "phi3": [
        GROUPED | {"sliding_window": 5},
        MULTI_QUERY | {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        GROUPED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ],
}
PARAMS = [
    pytest.param(family, number, id=f"{family}-{number}")
    for family, cases in CASES.items()
    for number in range(len(cases))
]


def make_torch_model(family, number, *, labels=0, dtype="float32"):
    """Return a random model of transformers; its norms and biases are random as well."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(number)
    config = transformers.AutoConfig.for_model(family, **(SMALL | CASES[family][number]))
    auto = transformers.AutoModelForCausalLM
    if labels:
        config.num_labels = labels
        auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(getattr(torch, dtype))


def load(folder, mesh, dtype="float32", **settings):
    settings = ModelConfig(params_dtype=dtype, compute_dtype="float32", **settings)
    config = hf.load_decoder_config(str(folder), settings)
    return hf.load_params(str(folder), config, mesh), config


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def draw_tokens():
    tokens = np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), LENGTH))
    return np.where(np.arange(LENGTH) < LENGTHS[:, None], tokens, 0).astype(np.int32)


def decode_rows(params, tokens, config):
    """Return the logits f32[rows, LENGTH, V] of decoding each row from its prefilled part on."""
    weights = caches.unstack_layers(params, config)
    prompts = tokens[:, : PREFILLED.max()]
    keys, values = caches.prefill(weights, prompts, jnp.asarray(PREFILLED), config)
    cache = caches.init_cache(config, slots=len(tokens), length=LENGTH)
    rows = jnp.arange(len(tokens))
    cache = caches.insert_prompts(cache, keys, values, rows, rows)

    def step(cache, number):
        positions = jnp.minimum(jnp.asarray(PREFILLED) - 1 + number, LENGTH - 1)
        logits, cache = caches.decode_step(
            weights, cache, tokens[rows, positions], positions, config
        )
        return cache, (logits, positions)

    _, (logits, positions) = jax.lax.scan(step, cache, jnp.arange(LENGTH))
    return jnp.zeros((len(tokens), LENGTH, VOCAB)).at[rows, positions].set(logits)


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("family", "number"), PARAMS)
def test_logits_and_decoding_equal_transformers(tmp_path, mesh1, family, number):
    model = make_torch_model(family, number)
    torch = pytest.importorskip("torch")
    tokens = draw_tokens()
    mask = torch.tensor(np.arange(LENGTH) < LENGTHS[:, None]).long()
    with torch.no_grad():
        expected = model(torch.tensor(tokens).long(), attention_mask=mask).logits.numpy()
    params, config = load(save(model, tmp_path), mesh1)

    @jax.jit
    def run(params, tokens):
        logits = compute_logits(params, tokens, jnp.asarray(LENGTHS), config)
        return logits, decode_rows(params, tokens, config)

    logits, decoded = map(np.asarray, run(params, jnp.asarray(tokens)))
    for row, length in enumerate(LENGTHS):
        start = PREFILLED[row] - 1
        assert relative_error(logits[row, :length], expected[row, :length]) < TOLERANCE
        assert relative_error(decoded[row, start:length], expected[row, start:length]) < TOLERANCE


def test_float32_rounds_no_worse_than_torch(tmp_path, mesh1):
    """Large weights make sharp attention, which multiplies the rounding of angles and scores: the
    two float32 results differ by more than usual, and from float64 each by as much."""
    torch = pytest.importorskip("torch")
    model = make_torch_model("llama", 0)
    tokens = draw_tokens()[:1]
    params, config = load(save(model, tmp_path), mesh1)
    ours = np.asarray(compute_logits(params, tokens, jnp.array([LENGTH]), config))

    class Exact(torch.nn.Module):
        def forward(self, x, position_ids):
            frequencies = torch.tensor(rope.inverse_frequencies(config.rope, config.head_dim))
            angles = position_ids[..., None].double() * frequencies.double()
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos(), angles.sin()

    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
        model = model.double()
        model.model.rotary_emb = Exact()
        exact = model(torch.tensor(tokens).long()).logits.numpy()
    error = np.abs(ours - exact).max()
    assert 0 < error < 4 * np.abs(theirs - exact).max()


def make_items():
    """Return the rows of `draw_tokens` as supervised items."""
    rows = [row[:length] for row, length in zip(draw_tokens(), LENGTHS, strict=True)]
    return [
        Item(row[:start], (row[start:],), (TARGET,))
        for row, start in zip(rows, PREFILLED, strict=True)
    ]


def make_batch(items):
    plan = plan_batches(
        items, batch_size=len(items), num_rows=1, tokens_per_row=512, row_multiple=8
    )
    return jax.tree.map(lambda x: jnp.asarray(x[0]), build_batch(items, plan, 0)), plan


@pytest.mark.parametrize("family", CASES)
def test_gradients_equal_torch(tmp_path, mesh1, family):
    # One packed row here, padded rows there; the gradient is read like a checkpoint.
    model = make_torch_model(family, 0)
    torch = pytest.importorskip("torch")
    # A layer that branches on its kind is the one that remat could get wrong.
    remat = "matmuls" if family == "gemma2" else "none"
    params, config = load(save(model, tmp_path / "model"), mesh1, remat=remat)
    tokens = torch.tensor(draw_tokens()).long()
    logps = model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    place = np.arange(1, LENGTH)
    responses = (place >= PREFILLED[:, None]) & (place < LENGTHS[:, None])
    loss = (logps * torch.tensor(responses)).sum() / responses.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    expected, _ = load(save(model, tmp_path / "gradient"), mesh1)

    batch, _ = make_batch(make_items())

    def mean_logp(params):
        return decoder.compute_logps(params, batch, config).sum() / responses.sum()

    value, got = jax.jit(jax.value_and_grad(mean_logp))(params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    expected = traverse_util.flatten_dict(expected, sep="/")
    for name, gradient in traverse_util.flatten_dict(got, sep="/").items():
        # A bias of the keys moves all scores of a query alike where nothing rotates it away.
        scale = np.abs(expected[name]).max() or 1.0
        error = np.abs(np.asarray(gradient - expected[name])).max() / scale
        assert error < TOLERANCE or scale < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("family", CASES)
def test_scores_equal_transformers(tmp_path, mesh1, family, labels):
    model = make_torch_model(family, 0, labels=labels)
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        tokens = torch.tensor(draw_tokens()).long()
        expected = model(tokens, attention_mask=(tokens > 0).long()).logits[:, -1].numpy()
    params, config = load(save(model, tmp_path), mesh1)
    assert config.num_labels == labels
    batch, plan = make_batch(make_items())
    scores = jax.jit(functools.partial(decoder.compute_scores, config=config))(params, batch)
    ((members,),) = plan.steps
    real = batch.sequences.weight[0] > 0
    items = np.array(members)[batch.sequences.group[0][real]]
    assert sorted(items) == [0, 1, 2]
    assert relative_error(np.asarray(scores[0][real]), expected[items]) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CASES)
def test_import_export_import_changes_no_bit(tmp_path, mesh, mesh1, family, dtype):
    model = make_torch_model(family, 0, dtype=dtype)
    params, config = load(save(model, tmp_path / "theirs"), mesh, dtype)
    export.save_model(params, config, tmp_path / "ours", source=tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    again, config_again = load(tmp_path / "ours", mesh1, dtype)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
