"""Training and scoring cases: what they report follows from what they ran."""

import jax
import pytest

from halos_jax.bench.training import run_forward_case, run_training_case
from halos_jax.bench.workloads import get_case, make_decoder, make_items
from halos_jax.packing.batches import plan_batches
from halos_jax.training.pace import count_forward_flops


@pytest.mark.parametrize(
    ("name", "passes"), [("dpo_1b_real", 4), ("reference_1b", 1), ("reward_1b", 1)]
)
def test_rates_agree_with_each_other(name, passes, config, mesh1, ceilings):
    case = get_case(name, tiny=True)
    run = run_training_case if case.kind == "train" else run_forward_case
    with jax.set_mesh(mesh1):
        found = run(case, config, mesh1, ceilings)
    decoder = make_decoder(case, config.model)
    items = make_items(case, steps=4, vocab_size=decoder.vocab_size)
    options = {"batch_size": case.examples, "num_rows": 1, "tokens_per_row": 10**5, "seed": 0}
    steps = plan_batches(items, **options).steps[2:]
    items = [items[index] for step in steps for row in step for index in row]
    assert len(items) == 2 * case.examples
    seconds = len(items) / found["examples_per_second"]
    assert seconds > 0 and found["compile_seconds"] > 0
    tokens = sum(item.num_tokens for item in items)
    assert found["tokens_per_second"] == pytest.approx(tokens / seconds)
    flops = passes * count_forward_flops(items, decoder)
    assert found["of_matmul_ceiling"] == pytest.approx(flops / seconds / ceilings.flops)
    assert 0 < found["fill"] <= 1
