"""The positions that a model was made for, as the configs of its families say them."""

import pytest

from halos_jax.config import Config, RewardConfig
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.positions import find_max_positions, refuse_longer
from halos_jax.models.spec import DecoderConfig, RopeConfig
from halos_jax.rewards import scorers


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({}, 0),
        ({"max_position_embeddings": True}, 0),
        ({"max_position_embeddings": -1}, 0),
        ({"max_position_embeddings": "2048"}, 0),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"text_config": None, "max_position_embeddings": 512}, 512),
        # Qwen 2.5's model card: 32,768 positions, stretched by YaRN to four times as many.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        # Llama 3.1 names the stretched length; its factor would say 65,536.
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 9, "rope_scaling": {"factor": float("nan")}}, 9),
        ({"max_position_embeddings": 9, "rope_scaling": None}, 9),
    ],
)
def test_positions_by_config(config, expected):
    assert find_max_positions(config) == expected


def test_sequences_may_not_go_where_the_angles_are_others():
    sizes = {"vocab_size": 8, "num_layers": 1, "d_model": 8, "num_heads": 1, "num_kv_heads": 1}
    sizes |= {"head_dim": 8, "d_mlp": 8}
    lengths = {"train.max_length": 4097, "reward.max_length": 4096}
    refuse_longer(DecoderConfig(**sizes), lengths)
    for ropes in (
        {"rope": RopeConfig(longest=4096)},
        {"local_rope": RopeConfig(longest=4096)},
        {"rope": RopeConfig(longest=9000), "local_rope": RopeConfig(longest=4096)},
    ):
        with pytest.raises(ModelError) as caught:
            refuse_longer(DecoderConfig(**sizes, **ropes), lengths)
        assert str(caught.value) == (
            "train.max_length: got 4,097, allowed: 4,096 at most, since the model's rotary "
            "embedding is another one in longer sequences (rope_scaling in its config.json)"
        )


def test_a_reward_model_reads_no_further_than_its_angles_hold(monkeypatch, mesh1):
    short = DecoderConfig(8, 1, 8, 1, 1, 8, 8, num_labels=1, rope=RopeConfig(longest=99))
    monkeypatch.setattr(scorers.hf, "load_decoder_config", lambda *given: short)
    config = Config(reward=RewardConfig(path="x", max_length=100))
    with pytest.raises(ModelError, match=r"reward\.max_length: got 100, allowed: 99 at most"):
        scorers.make_model_scorer(config, mesh1, None)
