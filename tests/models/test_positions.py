"""The positions that a model was made for, as the configs of its families say them."""

import pytest

from halos_jax.models.positions import find_max_positions


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
