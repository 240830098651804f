"""Key tables: a tensor for every array, and what is interleaved or shared between arrays."""

import numpy as np
import pytest

from halos_jax.models import spec
from halos_jax.models.hf import families
from halos_jax.models.hf.families import make_decoder_config

SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}


@pytest.mark.parametrize("model_type", sorted(families.FAMILIES))
def test_every_array_of_the_spec_has_its_tensor(model_type):
    family = families.FAMILIES[model_type]
    for labels, tied, biased in ((0, False, True), (0, True, False), (1, True, True)):
        name = family.classifier if labels else family.language_model
        made = {**SIZES, "model_type": model_type, "architectures": [name]}
        made |= {"num_labels": labels, "tie_word_embeddings": tied}
        config = make_decoder_config({**made, "attention_bias": biased, "mlp_bias": biased})
        assert config.num_labels == labels and config.tie_embeddings == tied
        shapes = spec.list_shapes(config)
        tensors = families.list_tensors(config, family)
        assert tensors.keys() == shapes.keys()
        for path, tensor in tensors.items():
            inside = path.startswith("layers/")
            assert tensor.num_stacked == inside + ("{expert}" in tensor.name)
            rank = len(shapes[path]) - tensor.num_stacked
            flattened = sorted(axis for group in tensor.axes for axis in group)
            assert flattened == list(range(rank))
            assert ("{layer}" in tensor.name) == inside


def test_gates_and_ups_of_gpt_oss_are_interleaved():
    config = make_decoder_config(
        {**SIZES, "model_type": "gpt_oss", "num_local_experts": 3, "num_experts_per_tok": 2}
    )
    tensors = families.list_tensors(config, families.FAMILIES["gpt_oss"])
    theirs = np.arange(3 * 32 * 48).reshape(3, 32, 48)
    biases = np.arange(3 * 48).reshape(3, 48)
    for start, name in enumerate(("gate", "up")):
        tensor, bias = (tensors[f"layers/expert_{name}{end}"] for end in ("", "_bias"))
        assert tensor.name == "model.layers.{layer}.mlp.experts.gate_up_proj"
        index = (slice(1, 3), slice(0, 32), slice(6, 24))
        found = tensor.read((3, 32, 24), index, theirs.__getitem__)
        np.testing.assert_array_equal(found, theirs[1:3, :, start::2][..., 6:24])
        found = bias.read((3, 24), (slice(0, 3), slice(0, 24)), biases.__getitem__)
        np.testing.assert_array_equal(found, biases[:, start::2])
