"""Schedules at every length, and the optimizer against torch's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halos_jax.config import Config, FeedbackConfig, GuardConfig, OptimizerConfig, RoundsConfig
from halos_jax.training import optim
from halos_jax.training.optim import make_optimizer, make_schedule

PEAK = 3e-4


def rates(total, **options):
    """Return the learning rate f64[total] of every step."""
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **options), total)
    return np.array([float(schedule(jnp.int32(step))) for step in range(total)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 5, 15, 200])
def test_the_peak_is_reached_and_never_passed_at_any_length(schedule, total):
    for options in ({}, {"warmup_steps": 10_000}, {"warmup_fraction": 1.0}, {"warmup_steps": 0}):
        found = rates(total, schedule=schedule, **options)
        np.testing.assert_allclose(found.max(), PEAK, rtol=1e-6)
        assert (found > 0).all()


def test_warmup_rises_in_equal_steps_from_its_start():
    found = rates(100, warmup_fraction=0.1, warmup_start=0.1)
    np.testing.assert_allclose(found[:10], PEAK * np.linspace(0.1, 0.91, 10), rtol=1e-5)
    np.testing.assert_allclose(found[10:], PEAK, rtol=1e-6)
    found = rates(100, warmup_fraction=0.5, warmup_steps=4, warmup_start=0.0)
    np.testing.assert_allclose(found[:5], PEAK * np.linspace(0, 1, 5), rtol=1e-5, atol=1e-12)


def test_decays_go_to_zero_at_the_end_of_the_run():
    after_warmup = np.arange(90) / 90
    linear = rates(100, schedule="linear")
    np.testing.assert_allclose(linear[10:], PEAK * (1 - after_warmup), rtol=1e-4)
    cosine = rates(100, schedule="cosine")
    expected = PEAK * (1 + np.cos(np.pi * after_warmup)) / 2
    np.testing.assert_allclose(cosine[10:], expected, rtol=1e-3)
    for schedule in ("linear", "cosine"):
        made = make_schedule(OptimizerConfig(schedule=schedule), 100)
        assert made(100) == made(150) == 0
    assert make_schedule(OptimizerConfig(), 100)(10_000) == np.float32(2e-6)


# --------------------------------------------------------------------------- optimizer

CONFIG = OptimizerConfig(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0, warmup_steps=2, eps=1e-8
)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    layers = {"q": draw(2, 5, 3), "mlp_norm": draw(2, 5)}
    return {"embed": draw(7, 5), "layers": layers, "final_norm": draw(5)}


def make_gradients(count, dtype=jnp.float32):
    """Draw gradients of which some are clipped and some are not."""
    rng = np.random.default_rng(1)
    scales = [0.01, 3.0, 0.1, 10.0, 0.02, 1.0]
    return [
        jax.tree.map(
            lambda x, scale=scale: jnp.asarray(scale * rng.normal(size=x.shape), dtype),
            make_params(),
        )
        for scale in scales[:count]
    ]


def run_ours(config, params, gradients):
    optimizer = make_optimizer(config, make_schedule(config, 100))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def test_steps_equal_torch_adamw_with_clipping():
    torch = pytest.importorskip("torch")
    gradients = make_gradients(6)
    norms = [float(optax.global_norm(gradient)) for gradient in gradients]
    assert min(norms) < CONFIG.max_grad_norm < max(norms)
    got, _ = run_ours(CONFIG, make_params(), gradients)

    leaves = {
        jax.tree_util.keystr(path): torch.nn.Parameter(torch.tensor(np.asarray(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(make_params())
    }
    groups = [
        {"params": [leaf for name, leaf in leaves.items() if "norm" in name], "weight_decay": 0.0},
        {"params": [leaf for name, leaf in leaves.items() if "norm" not in name]},
    ]
    options = {"betas": (CONFIG.beta1, CONFIG.beta2), "eps": CONFIG.eps}
    theirs = torch.optim.AdamW(groups, weight_decay=CONFIG.weight_decay, **options)
    schedule = make_schedule(CONFIG, 100)
    for number, gradient in enumerate(gradients):
        for leaf, value in zip(leaves.values(), jax.tree.leaves(gradient), strict=True):
            leaf.grad = torch.tensor(np.asarray(value))
        torch.nn.utils.clip_grad_norm_(leaves.values(), CONFIG.max_grad_norm)
        for group in theirs.param_groups:
            group["lr"] = float(schedule(number))
        theirs.step()
    for one, other in zip(jax.tree.leaves(got), leaves.values(), strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_the_first_step_is_the_sign_of_the_gradient_and_decays_matrices_alone():
    # Adam's first step is g / (|g| + eps), whatever the clipping did to the length of g.
    config = dataclasses.replace(CONFIG, warmup_steps=0)
    params, (gradient,) = make_params(), make_gradients(1)
    got, _ = run_ours(config, params, [gradient])
    for name, decay in (("embed", 0.1), ("final_norm", 0.0)):
        expected = params[name] - 1e-2 * (np.sign(gradient[name]) + decay * params[name])
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
@pytest.mark.parametrize(("biases", "norms"), [(True, False), (False, False), (True, True)])
def test_what_decays_is_chosen_by_kind(name, biases, norms):
    shapes = {"q": (2, 5, 3), "q_bias": (2, 3), "mlp_norm": (2, 5), "mlp_norm_bias": (2, 5)}
    params = {
        "embed": jnp.ones((7, 5)),
        "layers": {path: jnp.ones(shape) for path, shape in shapes.items()},
        "value": {"first": jnp.ones((5, 5)), "first_bias": jnp.ones(5)},
    }
    config = OptimizerConfig(name=name, weight_decay=0.5, decay_biases=biases, decay_norms=norms)
    # Without a gradient the decay alone moves anything.
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    moved = {
        path[-1].key: bool(np.any(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    expected = {"embed": True, "q": True, "first": True, "q_bias": biases, "first_bias": biases}
    assert moved == expected | {"mlp_norm": norms, "mlp_norm_bias": norms}


def adam_state(state):
    (found,) = (
        leaf
        for leaf in jax.tree.leaves(
            state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByAdamState)
        )
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    return found


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_have_their_own_dtype(moments):
    config = dataclasses.replace(CONFIG, moments_dtype=moments)
    params = make_params(jnp.bfloat16)
    got, state = run_ours(config, params, make_gradients(3, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    adam = adam_state(state)
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(moments)}


def test_bfloat16_params_take_the_steps_of_float32():
    # Equal inputs, so that all that differs is the rounding of the stored params.
    gradients = make_gradients(6, jnp.bfloat16)
    start = make_params(jnp.bfloat16)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    got, state = run_ours(CONFIG, start, gradients)
    expected, expected_state = run_ours(CONFIG, wide(start), [wide(one) for one in gradients])
    for one, other in zip(jax.tree.leaves(wide(got)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)
    # The moments see nothing of that rounding, the clipping's norm included.
    ours, theirs = adam_state(state), adam_state(expected_state)
    for one, other in zip(
        jax.tree.leaves((ours.mu, ours.nu)), jax.tree.leaves((theirs.mu, theirs.nu)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)


def test_wsd_is_constant_until_its_last_part():
    found = rates(100, schedule="wsd", decay_fraction=0.2)
    np.testing.assert_allclose(found[10:81], PEAK, rtol=1e-6)
    np.testing.assert_allclose(found[80:], PEAK * (1 - np.arange(20) / 20), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_every_optimizer_descends_and_its_state_can_be_sharded(name, mesh):
    from halos_jax.models.spec import (
        DecoderConfig,
        abstract_params,
        init_params,
        params_shardings,
    )
    from halos_jax.training.state import init_state, make_abstract_state

    decoder = DecoderConfig(32, 2, 16, 2, 2, 8, 24)
    config = OptimizerConfig(name=name, learning_rate=0.02, weight_decay=0.0, max_grad_norm=1e3)
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    params = jax.device_put(
        init_params(jax.random.key(0), decoder), params_shardings(decoder, mesh)
    )
    target = init_params(jax.random.key(1), decoder)
    abstract = make_abstract_state(abstract_params(decoder, mesh), optimizer, mesh)
    state = init_state(params, optimizer, abstract)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return sum(
                jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)))
            )

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state, values = state.params, state.opt_state, []
    for _ in range(12):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)


def test_muon_orthogonalises_the_matrices_of_an_adapter_and_all_of_it_decays():
    shapes = {
        "q_lora_a": (2, 16, 4),
        "o_lora_a": (2, 2, 8, 4),
        "q_lora_b": (2, 4, 2, 8),
        "q_norm": (2, 8),
    }
    params = {"layers": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    axes = optim._muon_dimensions(params)["layers"]
    found = {name: (one.reduction_axis, one.output_axis) for name, one in axes.items() if one}
    assert found == {
        "q_lora_a": ((1,), (2,)),
        "o_lora_a": ((1, 2), (3,)),
        "q_lora_b": ((1,), (2, 3)),
    }
    decayed = optim._choose_decayed(params, OptimizerConfig())["layers"]
    assert decayed == dict.fromkeys(shapes, True) | {"q_norm": False}

    # Of a step each matrix of each layer has singular values that are all alike.
    optimizer = make_optimizer(
        OptimizerConfig(name="muon", weight_decay=0.0), optax.constant_schedule(1.0)
    )
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for name, (inputs, _) in found.items():
        matrix = np.asarray(updates["layers"][name][1])
        rows = np.prod([shapes[name][axis] for axis in inputs])
        values = np.linalg.svd(matrix.reshape(rows, -1), compute_uv=False)
        assert values.max() < 2 * values.min(), name


def test_policy_and_value_head_are_clipped_each_by_its_own_norm():
    config = OptimizerConfig(
        name="sgd", beta1=0.0, weight_decay=0.0, max_grad_norm=2.0, value_max_grad_norm=0.1
    )
    optimizer = make_optimizer(config, lambda step: 1.0)
    params = {"a": jnp.zeros(2), "layers": {"q": jnp.zeros(2)}, "value": {"w": jnp.zeros(2)}}
    for scale in (1.0, 1e-3):
        gradient = jax.tree.map(lambda leaf, scale=scale: scale * jnp.array([3.0, 4.0]), params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        policy = np.sqrt(np.sum(np.square([updates["a"], updates["layers"]["q"]])))
        value = np.linalg.norm(updates["value"]["w"])
        np.testing.assert_allclose(policy, min(2.0, scale * np.sqrt(50)), rtol=1e-5)
        np.testing.assert_allclose(value, min(0.1, scale * 5), rtol=1e-5)


# --------------------------------------------------------------------------- decay by the budget

UNKNOWN = Config(feedback=FeedbackConfig(min_examples=1))


def decays(schedule, shares, **options):
    settings = OptimizerConfig(schedule=schedule, learning_rate=PEAK, warmup_steps=3, **options)
    made = optim.make_run_schedule(dataclasses.replace(UNKNOWN, optimizer=settings), 100)
    assert isinstance(made, optim.BudgetSchedule)
    rise = [float(made(step)) for step in range(3)]
    np.testing.assert_allclose(rise, PEAK * np.linspace(0.1, 0.7, 3), rtol=1e-5)
    assert made(3) == made(500) == np.float32(PEAK), "the rest is not in steps"
    return [float(made.decay(jnp.float32(share))) for share in shares]


def test_a_decay_by_the_budget_goes_from_all_of_the_rate_to_none():
    shares = [0.0, 0.25, 0.5, 0.9, 1.0]
    np.testing.assert_allclose(decays("linear", shares), [1, 0.75, 0.5, 0.1, 0], atol=1e-6)
    cosine = [(1 + np.cos(np.pi * share)) / 2 for share in shares]
    np.testing.assert_allclose(decays("cosine", shares), cosine, atol=1e-6)
    found = decays("wsd", shares, decay_fraction=0.4)
    np.testing.assert_allclose(found, [1, 1, 1, 0.25, 0], atol=1e-6)
    assert decays("wsd", shares, decay_fraction=0.0) == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_known_length_has_the_schedule_by_steps(schedule):
    """So does a constant rate, and a task whose number of steps refill does not change."""
    settings = OptimizerConfig(schedule=schedule, learning_rate=PEAK)
    expected = make_schedule(settings, 40)
    unknown = dataclasses.replace(UNKNOWN, optimizer=settings)
    cases = [Config(optimizer=settings), dataclasses.replace(unknown, task="align")]
    cases += [unknown] if schedule == "constant" else []
    for config in cases:
        assert not optim.decays_by_budget(config)
        made = optim.make_run_schedule(config, 40)
        assert not isinstance(made, optim.BudgetSchedule)
        assert [float(made(n)) for n in range(42)] == [float(expected(n)) for n in range(42)]
    assert optim.has_unknown_steps(unknown)
    for chooses in (
        {"rounds": RoundsConfig(prompts_per_round="auto")},
        {"guard": GuardConfig(action="retry")},
    ):
        found = optim.decays_by_budget(Config(optimizer=settings, **chooses))
        assert found == (schedule != "constant")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_the_update_of_every_optimizer_is_proportional_to_the_rate(name):
    """So a decay may multiply the update instead of the rate."""
    params, (gradient,) = make_params(), make_gradients(1)
    updates = []
    for rate in (1e-2, 2.5e-3):
        config = dataclasses.replace(CONFIG, name=name, learning_rate=rate)
        optimizer = make_optimizer(config, optax.constant_schedule(rate))
        found, _ = optimizer.update(gradient, optimizer.init(params), params)
        updates.append(jax.tree.leaves(found))
    for large, small in zip(*updates, strict=True):
        np.testing.assert_allclose(small, 0.25 * large, rtol=1e-5, atol=1e-9)
        assert np.abs(large).max() > 0
