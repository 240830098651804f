"""New rows of embedding and head: what they hold, and that everybody gets the same."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from halos_jax.config import ModelConfig
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.models.files.vocab import check_ids, find_unknown, fit_vocab
from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig
from tests.logits import compute_logits

CONFIG = DecoderConfig(
    vocab_size=20, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_mlp=12
)
TOKENS = {f"t{number}": number for number in range(18)}  # two rows of padding


def fit(new=(), config=CONFIG, vocabulary=TOKENS, **settings):
    """Return the config that has the tokens `new` behind those of `vocabulary`."""
    first = 1 + max(vocabulary.values())
    settings = ModelConfig(path="model", added_tokens=tuple(new), **settings)
    added = {token: first + number for number, token in enumerate(new)}
    return fit_vocab(config, vocabulary | added, new, settings)


def test_a_vocabulary_grows_only_where_it_must_and_never_shrinks():
    assert fit().vocab_size == 20 and fit().new_rows == ()
    spare = fit(["a", "b"], pad_vocab_to=64)
    assert spare.vocab_size == 20 and spare.new_rows == (18, 19)
    assert fit(["a", "b", "c"]).vocab_size == 21
    grown = fit(["a", "b", "c"], pad_vocab_to=16, added_tokens_init="random")
    assert grown.vocab_size == 32 and grown.new_rows == (18, 19, 20)
    assert grown.new_rows_init == "random"
    holes = {"x": 3, "y": 40}
    assert fit(vocabulary=holes, random_init=True).vocab_size == 41


def test_tokens_without_rows_must_be_asked_for():
    vocabulary = TOKENS | {f"[EXTRA{number}]": 20 + number for number in range(7)}
    with pytest.raises(ModelError) as caught:
        fit(vocabulary=vocabulary)
    assert (
        "the tokenizer has 7 tokens ('[EXTRA0]', '[EXTRA1]', '[EXTRA2]', '[EXTRA3]', '[EXTRA4]', "
        "...) beyond the 20 rows of the embedding of 'model'; allowed: a row for every token; set "
    ) in str(caught.value)
    named = ModelConfig(path="model", added_tokens=tuple(vocabulary)[-7:])
    assert fit_vocab(CONFIG, vocabulary, (), named).vocab_size == 27
    check_ids(19, CONFIG, "reward")
    with pytest.raises(ModelError, match=r"reward: .* gave the token 20, but .* 20 rows"):
        check_ids(20, CONFIG, "reward")


@pytest.fixture
def model(tmp_path, mesh1):
    """Return a folder with a model of CONFIG."""
    params = spec.init_params(jax.random.key(0), CONFIG)
    export.save_model(params, CONFIG, tmp_path / "model", source=None, dtype="bfloat16")
    return str(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_of_the_known_ones(model, mesh, mesh1, dtype):
    config = fit(["a", "b", "c"], dataclasses.replace(CONFIG, params_dtype=dtype), pad_vocab_to=8)
    params = hf.load_params(model, config, mesh)
    stored = load_file(f"{model}/model.safetensors")
    for path, name in {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}.items():
        got = np.asarray(params[path]).astype(np.float64)
        known = stored[name].astype(np.float64)[:18]
        assert got.shape == (24, 8)
        np.testing.assert_array_equal(got[:18], known)
        mean = known.mean(axis=0)
        mean = mean.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        np.testing.assert_array_equal(got[18:], np.broadcast_to(mean.astype(float), (6, 8)))
    again = hf.load_params(model, config, mesh1)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_device_may_hold_new_rows_alone(model, mesh, mesh1):
    config = fit(["a", "b", "c"], pad_vocab_to=64)
    params = hf.load_params(model, config, mesh)
    starts = {shard.index[0].start for shard in params["embed"].addressable_shards}
    assert 32 in starts  # beyond the 20 rows of the file
    jax.tree.map(np.testing.assert_array_equal, params, hf.load_params(model, config, mesh1))


def test_random_rows_differ_and_are_the_same_for_everybody(model, mesh, mesh1):
    config = fit(["a", "b", "c", "d"], added_tokens_init="random")
    params = hf.load_params(model, config, mesh)
    again = hf.load_params(model, config, mesh1)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    rows = np.concatenate([np.asarray(params[path])[18:] for path in ("embed", "head")])
    assert len(np.unique(rows, axis=0)) == 8
    assert 0.01 < rows.std() < 0.03  # init_std is 0.02
    # One token less: those that stay have the rows that they had.
    fewer = hf.load_params(model, fit(["a", "b", "c"], added_tokens_init="random"), mesh1)
    np.testing.assert_array_equal(fewer["embed"], np.asarray(params["embed"])[:21])


def test_a_grown_model_is_exported_whole_and_tied_heads_follow(tmp_path, mesh1):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    source = tmp_path / "model"
    export.save_model(spec.init_params(jax.random.key(0), tied), tied, source, source=None)
    config = fit(["a", "b", "c"], tied)
    params = hf.load_params(str(source), config, mesh1)
    export.save_model(params, config, tmp_path / "grown", source=source)
    read = hf.load_decoder_config(str(tmp_path / "grown"))
    assert read.vocab_size == 21 and read.new_rows == ()
    loaded = hf.load_params(str(tmp_path / "grown"), read, mesh1)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    smaller = dataclasses.replace(read, vocab_size=20)
    with pytest.raises(ModelError, match=r"got shape \(21, 8\), config.json asks for \(20, 8\)"):
        hf.load_params(str(tmp_path / "grown"), smaller, mesh1)


def test_transformers_reads_a_grown_model(tmp_path, model, mesh1):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(fit(["a", "b", "c"]), params_dtype="float32")
    params = hf.load_params(model, config, mesh1)
    export.save_model(params, config, tmp_path / "grown", source=tmp_path / "model")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grown", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = np.array([[3, 20, 18, 5, 19]], np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    got = compute_logits(params, tokens, np.array([5]), config)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("known", "ranges"),
    [
        (range(6), ()),
        (range(9), ()),  # a tokenizer with more tokens than rows
        (range(4), ((4, 6),)),
        ([0, 2, 5], ((1, 2), (3, 5))),
        ([1], ((0, 1), (2, 6))),
        ([], ((0, 6),)),
    ],
)
def test_rows_without_a_token(known, ranges):
    assert find_unknown(known, 6) == ranges
