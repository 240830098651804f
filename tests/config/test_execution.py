import dataclasses

from halos_jax.config import Config, ModelConfig, schema
from halos_jax.config.execution import Execution
from halos_jax.models.spec import DecoderConfig


def test_model_settings_and_decoder_have_every_switch_and_the_command_line_names_stay_flat():
    names = [field.name for field in dataclasses.fields(Execution)]
    assert names == [
        "params_dtype",
        "compute_dtype",
        "attention",
        "remat",
        "head_remat",
        "unroll_layers",
        "head_chunk",
    ]
    paths = schema.leaf_types(Config)
    for name in names:
        assert f"model.{name}" in paths
    assert isinstance(ModelConfig(remat="full"), Execution)


def test_a_decoder_without_settings_has_nothing_left_to_choose():
    decoder = DecoderConfig(61, 2, 128, 4, 2, 32, 192)
    chosen = (decoder.remat, decoder.head_remat, decoder.compute_dtype, decoder.head_chunk)
    assert chosen == ("none", True, "float32", 2048)
    assert (decoder.num_layers, decoder.d_mlp) == (2, 192)
