"""What a case costs, against counts made by hand, and that ceilings are rates."""

from halos_jax.bench.ceilings import count_decode_bytes, measure_ceilings
from halos_jax.models.spec import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=11,
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_mlp=6,
    compute_dtype="bfloat16",
)


def test_bytes_of_a_decode_step():
    weights = 2 * (64 + 32 + 32 + 64 + 3 * 48 + 16) + 8 + 11 * 8  # the table is only looked up
    cache = 4 * 10 * 2 * 2 * 4  # slots, tokens, layers, keys and values, head
    assert count_decode_bytes(CONFIG, slots=4, mean_length=10) == 2 * (weights + cache)


def test_ceilings_are_positive_rates():
    ceilings = measure_ceilings(tiny=True)
    assert 1e6 < ceilings.flops < 1e16 and 1e6 < ceilings.bytes < 1e14
