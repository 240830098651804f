"""The optimizer step: one result for every packing, microbatching and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halos_jax import sharding
from halos_jax.losses import get_loss
from halos_jax.models import decoder
from halos_jax.models.lora import Adapter, Frozen, start_dropout
from halos_jax.models.spec import (
    DecoderConfig,
    abstract_params,
    init_params,
    params_shardings,
)
from halos_jax.packing.batches import build_batch, plan_batches, split_logps
from halos_jax.training import inputs
from halos_jax.training import step as steps
from halos_jax.training.state import init_state, make_abstract_state
from halos_jax.types import CHOSEN, REJECTED, TARGET, Batch, Item
from tests.logits import compute_logits, encode_rows

TINY = DecoderConfig(
    vocab_size=97,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    init_std=0.2,
    head_chunk=7,
)
CLASSIFIER = dataclasses.replace(TINY, num_labels=1)
LOSSES = {
    "dpo": ({"name": "dpo", "beta": 0.3}, (CHOSEN, REJECTED), TINY),
    "sft": ({"name": "sft"}, (TARGET,), TINY),
    "bradley-terry": ({"name": "bradley-terry"}, (CHOSEN, REJECTED), CLASSIFIER),
}
COUNT = 8
PACKINGS = {
    # Sequences of three lengths; the other cases have one, which compiles in half the time.
    "one packed row": {"num_rows": 1, "microbatches": 1, "row_multiple": 8},
    "an item a row": {"num_rows": COUNT, "microbatches": 1},
    "four microbatches": {"num_rows": 1, "microbatches": 4},
}


@functools.cache
def make_items(roles):
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.integers(1, 97, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    size = 11 if len(roles) > 1 else 26
    return [
        Item(draw(1, 9), tuple(draw(1, size) for _ in roles), roles, weight=1.0 + index % 2)
        for index in range(COUNT)
    ]


def make_batch(roles, reference=None, *, num_rows, microbatches, row_multiple=32):
    """Plan and build the one batch; its rows are as long as gives that many microbatches."""
    items = make_items(roles)
    for tokens in range(sum(item.num_tokens for item in items), 0, -1):
        plan = plan_batches(
            items,
            batch_size=COUNT,
            num_rows=num_rows,
            tokens_per_row=tokens,
            row_multiple=row_multiple,
        )
        if plan.layout.microbatches == microbatches:
            break
    return plan, build_batch(items, plan, 0, reference_logps=reference)


@functools.cache
def make_params(config):
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), config))


@functools.cache
def make_reference():
    """Return token log-probs of some other policy for the responses of the pairs."""
    rng = np.random.default_rng(5)
    return [
        tuple(-rng.exponential(4.0, len(response)).astype(np.float32) for response in one.responses)
        for one in make_items((CHOSEN, REJECTED))
    ]


# --------------------------------------------------------------------------- plain reference


def plain_rows(items):
    """Return every completion behind its own copy of the prompt, right-padded, and its mask."""
    rows = [np.concatenate([i.prompt_ids, r]) for i in items for r in i.responses]
    starts = [len(item.prompt_ids) for item in items for _ in item.responses]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[number, : len(row)] = row
        mask[number, start : len(row)] = True
    return tokens, mask, np.array([len(row) for row in rows])


def plain_logps(params, items, config):
    """Return the sums of response log-probs f32[items, responses], one sequence a row."""
    tokens, mask, lengths = plain_rows(items)
    logits = compute_logits(params, tokens, jnp.asarray(lengths), config)
    logps = jax.nn.log_softmax(logits[:, :-1])
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(mask[:, 1:], logps, 0).sum(axis=1).reshape(len(items), -1)


def plain_loss(params, name):
    """Write the loss down again, without packing, view, chunked head or registry."""
    settings, roles, config = LOSSES[name]
    items = make_items(roles)
    weights = np.array([item.weight for item in items], np.float32)
    if name == "bradley-terry":
        tokens, _, lengths = plain_rows(items)
        hidden = encode_rows(params, tokens, jnp.asarray(lengths), config)
        last = hidden[np.arange(len(tokens)), lengths - 1]
        scores = (last @ params["score"][0]).reshape(COUNT, 2)
        margins = scores[:, 0] - scores[:, 1]
    else:
        sums = plain_logps(params, items, config)
        if name == "sft":
            return -(sums[:, 0] * weights).sum() / sum(len(i.responses[0]) for i in items)
        sums -= np.array([[part.sum() for part in parts] for parts in make_reference()])
        margins = settings["beta"] * (sums[:, 0] - sums[:, 1])
    return (weights * jnp.log1p(jnp.exp(-margins))).sum() / weights.sum()


@functools.cache
def expected(name):
    params = make_params(LOSSES[name][2])
    run = jax.jit(functools.partial(jax.value_and_grad(plain_loss), name=name))
    return jax.tree.map(np.asarray, run(params))


def compare(got, expected, tolerance=2e-5):
    (value, gradient), (expected_value, expected_gradient) = got, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    assert jax.tree.structure(gradient) == jax.tree.structure(expected_gradient)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


def run_ours(name, batch, params=None):
    settings, _, config = LOSSES[name]
    run = jax.jit(
        functools.partial(steps.loss_and_gradient, loss=get_loss(settings), config=config)
    )
    value, gradient, _ = run(make_params(config) if params is None else params, None, batch)
    return jax.tree.map(np.asarray, (value, gradient))


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("dpo", "one packed row"),
        ("dpo", "an item a row"),
        ("bradley-terry", "four microbatches"),
    ],
)
def test_loss_and_gradient_equal_those_of_separate_rows(one, name, packing):
    reference = make_reference() if name == "dpo" else None
    plan, batch = make_batch(LOSSES[name][1], reference, **PACKINGS[packing])
    held = {len(row) for row in plan.steps[0]}
    assert (held == {1}) == (packing == "an item a row")
    compare(run_ours(name, batch), expected(name))


def test_eight_devices_give_the_loss_and_gradient_of_one(mesh):
    # Two microbatches of four rows, which are shared by data and fsdp; heads by tensor.
    _, batch = make_batch((CHOSEN, REJECTED), make_reference(), num_rows=4, microbatches=2)
    params = jax.device_put(make_params(TINY), params_shardings(TINY, mesh))
    got = run_ours("dpo", sharding.put_batch(batch, mesh, leading=1), params)
    with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1])):
        wanted = expected("dpo")
    compare(got, wanted)


def talk(seed):
    """Draw a conversation of two answers as one item, and as an item an answer."""
    draw = np.random.default_rng(seed)
    prompt, first, between, second = (
        draw.integers(1, 97, size).astype(np.int32) for size in draw.integers(2, 9, 4)
    )
    whole = np.concatenate([first, between, second])
    mask = np.repeat([True, False, True], [len(first), len(between), len(second)])
    history = np.concatenate([prompt, first, between])
    answers = [Item(prompt, (first,), (TARGET,)), Item(history, (second,), (TARGET,))]
    return Item(prompt, (whole,), (TARGET,), masks=(mask,)), answers


@pytest.mark.parametrize("tokens", [4096, 64])
def test_a_conversation_trains_as_its_answers_one_by_one(one, tokens):
    talks = [talk(seed) for seed in range(4)]
    separate = [answer for _, answers in talks for answer in answers]
    results = []
    for items, longest in ((separate, 4096), ([item for item, _ in talks], tokens)):
        plan = plan_batches(items, batch_size=8, num_rows=1, tokens_per_row=longest)
        assert (plan.layout.microbatches > 1) == (longest == 64)
        results.append(run_ours("sft", build_batch(items, plan, 0)))
    compare(results[1], results[0])


# --------------------------------------------------------------------------- the step


def take_step(name, mesh, batch, optimizer, schedule):
    settings, _, config = LOSSES[name]
    abstract = make_abstract_state(abstract_params(config, mesh), optimizer, mesh)
    params = jax.device_put(make_params(config), params_shardings(config, mesh))
    # A copy, since device_put may share the arrays' memory and the step takes them over.
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, abstract)
    run = steps.compile_train_step(abstract, get_loss(settings), optimizer, schedule, config, mesh)
    after, metrics = run(state, None, sharding.put_batch(batch, mesh, leading=1))
    return abstract, state, after, metrics


def plain_metrics(params):
    """Return DPO's metrics by hand."""
    logps = np.asarray(plain_logps(params, make_items((CHOSEN, REJECTED)), TINY))
    reference = np.array([[part.sum() for part in parts] for parts in make_reference()])
    rewards = 0.3 * (logps - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
    }


def check_step(name, mesh, batch):
    """Take a step of plain gradient descent; hold it, its metrics and evaluation to the loss."""
    settings, _, config = LOSSES[name]
    abstract, state, after, metrics = take_step(
        name, mesh, batch, optax.sgd(1.0), lambda step: 0.5 / (1 + step)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the state was not donated"
    before, (value, gradient) = make_params(config), expected(name)
    moved = jax.tree.map(lambda new, old: old - np.asarray(new), after.params, before)
    compare((metrics["loss"], moved), (value, gradient))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert (after.step, metrics["counters/lr"]) == (1, 0.5)
    assert {metric.shape for metric in metrics.values()} == {()}
    # The step leaves everything where it was, so that the next call is the same program.
    for leaf, promised in zip(jax.tree.leaves(after), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)

    evaluate = steps.compile_eval_step(get_loss(settings), config, mesh)
    params = jax.device_put(before, params_shardings(config, mesh))
    sums = jax.device_get(evaluate(params, None, sharding.put_batch(batch, mesh, leading=1)))
    assert metrics.keys() - sums.keys() == {"grad_norm", "counters/lr"}
    for key, (total, count) in sums.items():
        np.testing.assert_allclose(total / count, metrics[key], rtol=1e-5, err_msg=key)
    return metrics, sums


def test_a_dpo_step_in_microbatches(one):
    items = make_items((CHOSEN, REJECTED))
    _, batch = make_batch((CHOSEN, REJECTED), make_reference(), **PACKINGS["four microbatches"])
    metrics, sums = check_step("dpo", one, batch)
    for name, wanted in plain_metrics(make_params(TINY)).items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-4, err_msg=name)
    assert sums["loss"][1] == sum(item.weight for item in items)


def test_an_sft_step_in_microbatches_on_the_mesh(mesh, mesh1):
    with jax.set_mesh(mesh1):
        expected("sft")
    _, batch = make_batch((TARGET,), num_rows=4, microbatches=2)
    _, sums = check_step("sft", mesh, batch)
    assert sums["loss"][1] == sum(len(item.responses[0]) for item in make_items((TARGET,)))


def test_dpo_starts_at_ln_2_with_the_reference_that_logps_gives(one):
    items = make_items((CHOSEN, REJECTED))
    plan, batch = make_batch((CHOSEN, REJECTED), **PACKINGS["four microbatches"])
    params = jax.tree.map(jnp.asarray, make_params(TINY))
    logps = np.asarray(inputs.compile_logps(TINY, one)(params, None, batch))
    found = dict(split_logps(plan, 0, items, logps))
    sums = [[part.sum() for part in found[index]] for index in range(COUNT)]
    np.testing.assert_allclose(sums, plain_logps(params, items, TINY), rtol=1e-4)

    reference = [found[index] for index in range(COUNT)]
    batch = build_batch(items, plan, 0, reference_logps=reference)
    np.testing.assert_array_equal(batch.reference_logps, logps)
    evaluate = steps.compile_eval_step(get_loss({"name": "dpo"}), TINY, one)
    sums = jax.device_get(evaluate(params, None, batch))
    total, count = sums["loss"]
    np.testing.assert_allclose(total / count, np.log(2), rtol=1e-6)
    assert abs(sums["rewards/margins"][0]) < 1e-4


@pytest.mark.parametrize("packing", ["one packed row", "four microbatches"])
def test_gradients_have_the_dtype_of_their_params_and_the_loss_is_float32(packing):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", params_dtype="bfloat16")
    _, batch = make_batch((CHOSEN, REJECTED), make_reference(), **PACKINGS[packing])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(TINY))
    loss = get_loss(LOSSES["dpo"][0])
    run = functools.partial(steps.loss_and_gradient, loss=loss, config=config)
    value, gradient, sums = jax.eval_shape(run, params, None, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, sums))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("bfloat16")}


# --------------------------------------------------------------------------- whole-step statistics


@pytest.mark.parametrize("name", ["kto", "grpo", "ipo"])
def test_every_kind_of_item_gives_one_result_for_microbatches_and_devices(mesh, make_varied, name):
    build = make_varied(name)
    loss = get_loss({"name": name})
    run = jax.jit(functools.partial(steps.loss_and_gradient, loss=loss, config=TINY))
    results = []
    with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1])):
        for microbatches in (1, 4):
            results.append(jax.device_get(run(make_params(TINY), None, build(1, microbatches))))
    params = jax.device_put(make_params(TINY), params_shardings(TINY, mesh))
    placed = sharding.put_batch(build(4, 2), mesh, leading=1)
    results.append(jax.device_get(run(params, None, placed)))
    value, gradient, sums = results[0]
    if name == "kto":
        total, count = sums["rewards/KL_estimate"]
        assert total / count > 0.1, "a KL of 0 would hide how it is averaged"
    for other in results[1:]:
        compare(other[:2], (value, gradient))
        for key in sums.keys() - {"loss"}:
            ratios = [x[2][key][0] / max(x[2][key][1], 1) for x in (results[0], other)]
            np.testing.assert_allclose(*ratios, rtol=1e-4, err_msg=key)
    evaluate = steps.compile_eval_step(loss, TINY, mesh)
    evaluated = jax.device_get(evaluate(params, None, placed))
    np.testing.assert_allclose(evaluated["loss"][0] / evaluated["loss"][1], value, rtol=1e-5)


def test_one_microbatch_needs_no_second_forward_pass_for_the_statistics(one, make_varied):
    loss, calls = get_loss({"name": "kto"}), []
    original = decoder.compute_logps

    def count(*arguments):
        calls.append(1)
        return original(*arguments)

    build = make_varied("kto")
    run = functools.partial(steps.loss_and_gradient, loss=loss, config=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "compute_logps", count)
        jax.make_jaxpr(run)(make_params(TINY), None, build(1, 1))
    assert len(calls) == 1


@pytest.mark.parametrize("microbatches", [1, 3])
def test_each_microbatch_has_a_dropout_of_its_own(monkeypatch, microbatches):
    def batch_loss(params, frozen, batch, loss, config, statistics=None, teacher=None):
        return params["w"] * jax.random.uniform(frozen.dropout_key), {}

    monkeypatch.setattr(steps, "batch_loss", batch_loss)
    frozen = start_dropout(Frozen({}, Adapter(1, 1.0, (), dropout=0.5)), 4)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Batch))
    batch = Batch(**fields | {"tokens": np.zeros((microbatches, 1, 1), np.int32)})
    value, gradient, _ = steps.loss_and_gradient(
        {"w": jnp.float32(2)}, frozen, batch, get_loss({"name": "sft"}), None
    )
    keys = [jax.random.fold_in(frozen.dropout_key, number) for number in range(microbatches)]
    expected = sum(float(jax.random.uniform(key)) for key in keys)
    np.testing.assert_allclose([value, gradient["w"]], [2 * expected, expected], rtol=1e-6)
