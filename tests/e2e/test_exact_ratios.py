"""The gradient of the first step is that of the expected reward of what the sampler draws.

All answers of two tokens to one prompt are enumerated, with what the sampler says of each token;
expected rewards are the formula's, in float64 from the model's logits.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.drawn import Drawn
from halos_jax.losses import get_loss
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.sampling.decode import derive_keys
from halos_jax.sampling.draws import DecodeSettings, draw_exactly
from halos_jax.training.inputs import compute_inputs
from halos_jax.training.step import loss_and_gradient
from halos_jax.types import MEMBER, Item
from tests.logits import compute_logits
from tests.sampling.exact_sets import list_kept

PROMPT, VOCAB, UNKNOWN = (1, 2), 8, ((7, 8),)
CONFIG = DecoderConfig(VOCAB, 1, 16, 2, 2, 8, 24, init_std=0.3, unknown_rows=UNKNOWN)
REWARDS = np.random.default_rng(3).uniform(size=(VOCAB, VOCAB))
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9, "max_kept": 3},
]
LOSS = get_loss({"name": "dr_grpo", "max_tokens": 1.0})
# One group of two answers has half of the gradient: the other is the baseline, itself included.
SHARE = 0.5


@jax.jit
def run_model(params):
    """Return the logits f32[1 + V, V] after the prompt, and after it and each token."""
    tokens = np.array([[*PROMPT, token] for token in range(VOCAB)])
    logits = compute_logits(params, tokens, np.full(VOCAB, 3), CONFIG)
    return jnp.concatenate([logits[:1, 1], logits[:, 2]])


def measure(params, settings):
    """Return the expected reward, and the sets that tokens are drawn from at each context."""
    logits = np.asarray(run_model(params), np.float64)
    logits[:, UNKNOWN[0][0] :] = -np.inf
    options = {name: settings[name] for name in settings if name != "max_kept"}
    sets = [list_kept(row, **options, most=settings.get("max_kept", VOCAB)) for row in logits]
    reward = sum(
        share * other * REWARDS[first, second]
        for first, share in sets[0].items()
        for second, other in sets[1 + first].items()
    )
    return reward, [sorted(one) for one in sets]


def draw_all(params, settings):
    """Return for each context {token: log-probability} and the kept ids, from the sampler."""
    is_filtered = "top_k" in settings or "top_p" in settings
    made = DecodeSettings(
        **{"top_k": 0, "top_p": 1.0, "max_kept": VOCAB if is_filtered else 0} | settings,
        max_tokens=2,
        chunk=1,
        stop_ids=(),
        unknown=UNKNOWN,
        is_exact=True,
    )
    count, contexts = 4000, 1 + VOCAB
    logits = jnp.repeat(run_model(params), count, axis=0)
    keys = derive_keys(0, 1, [1] * len(logits), range(len(logits)))
    drawn = jax.jit(draw_exactly, static_argnums=3)(
        logits, keys, jnp.zeros(len(logits), jnp.int32), made
    )
    tokens, logps = (
        np.asarray(x).reshape(contexts, count) for x in (drawn.tokens, drawn.drawn_logps)
    )
    found = [dict(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), logps, strict=True)]
    if drawn.kept is None:
        return found, [None] * contexts
    kept = np.asarray(drawn.kept)[::count]
    return found, [np.sort(row[row >= 0]) for row in kept]


def make_items(params, settings):
    """Return all groups of two answers, each weighed by its probability."""
    logps, kept = draw_all(params, settings)
    answers = []
    for first in logps[0]:
        for second, logp in logps[1 + first].items():
            steps = (logps[0][first], logp)
            sets = (kept[0], kept[1 + first])
            drawn = Drawn(settings["temperature"], tuple(map(float, steps)))
            if sets[0] is not None:
                ids = np.concatenate(sets).astype("<i4").tobytes()
                drawn = dataclasses.replace(drawn, kept_counts=tuple(map(len, sets)), kept_ids=ids)
            answers.append(((first, second), drawn, float(np.exp(sum(steps)))))
    total = sum(share for *_, share in answers)
    assert total == pytest.approx(1, abs=1e-5), "every answer that can be drawn was drawn"
    return [
        Item(
            np.array(PROMPT, np.int32),
            tuple(np.array(ids, np.int32) for ids, *_ in pair),
            (MEMBER, MEMBER),
            tuple(float(REWARDS[ids]) for ids, *_ in pair),
            weight=pair[0][2] * pair[1][2],
            old_logps=tuple(np.array(drawn.logps, np.float32) for _, drawn, _ in pair),
            drawn=tuple(drawn for _, drawn, _ in pair),
        )
        for pair in itertools.product(answers, answers)
    ]


def forget_drawn(params, items):
    """Return the items as they were before: the policy's own log-probabilities, nothing else."""
    logps = np.asarray(jax.nn.log_softmax(run_model(params)))

    def look_up(ids):
        return np.array([logps[0, ids[0]], logps[1 + ids[0], ids[1]]], np.float32)

    return [
        dataclasses.replace(one, drawn=(), old_logps=tuple(map(look_up, one.responses)))
        for one in items
    ]


@jax.jit
def differentiate(params, batch):
    _, gradient, _ = loss_and_gradient(params, None, batch, LOSS, CONFIG)
    one = jax.tree.map(lambda x: x[0], batch)
    inputs = compute_inputs(params, None, one, LOSS, CONFIG)
    ratios = jnp.where(one.is_response, inputs.policy - inputs.old, 0.0)
    return gradient, jnp.abs(ratios).max()


def find_gradient(params, items):
    plan = plan_batches(
        items, batch_size=len(items), num_rows=8, tokens_per_row=4096, row_multiple=8
    )
    batch = jax.tree.map(jnp.asarray, build_batch(items, plan, 0))
    gradient, ratio = differentiate(params, batch)
    assert ratio < 1e-5, "before the first step every ratio is 1"
    return jax.tree.map(lambda x: -np.asarray(x, np.float64) / SHARE, gradient)


def move(params, direction, size):
    return jax.tree.map(lambda x, d: x + np.float32(size) * d, params, direction)


def difference(params, direction, settings, size=0.005):
    """Return the derivative of the expected reward along `direction`, to the fourth order."""
    rewards = {}
    for step in (-2, -1, 1, 2):
        rewards[step], sets = measure(move(params, direction, step * size), settings)
        assert sets == measure(params, settings)[1], "no set may change on the way"
    return (8 * (rewards[1] - rewards[-1]) - (rewards[2] - rewards[-2])) / (12 * size)


def draw_directions(params, gradient):
    """Return directions of length 1: the gradient's, and others at random."""
    leaves, structure = jax.tree.flatten(gradient)
    rng = np.random.default_rng(0)
    for leaves_of in (leaves, *([rng.normal(size=x.shape) for x in leaves] for _ in range(3))):
        norm = np.sqrt(sum((x**2).sum() for x in leaves_of))
        yield jax.tree.unflatten(structure, [np.float32(x / norm) for x in leaves_of])


@pytest.fixture(scope="module")
def moved():
    """Return a policy a step away from the sampler's, and groups with what they were drawn from."""
    settings = {"temperature": 1.3, "top_p": 0.9, "max_kept": 3}
    items = make_items(init_params(jax.random.key(0), CONFIG), settings)[::4]
    return init_params(jax.random.key(1), CONFIG), [
        dataclasses.replace(x, weight=1.0) for x in items
    ]


def test_rows_microbatches_and_devices_do_not_change_the_gradient(mesh, moved):
    params, items = moved
    results = []
    for sizes, options in (
        (None, {"num_rows": 1, "tokens_per_row": 4096}),
        (None, {"num_rows": 1, "tokens_per_row": 32}),
        (mesh, {"num_rows": 4, "tokens_per_row": 32}),
    ):
        plan = plan_batches(items, batch_size=len(items), row_multiple=8, **options)
        assert (plan.layout.microbatches > 1) == (options["tokens_per_row"] == 32)
        batch = build_batch(items, plan, 0)
        if sizes is None:
            with jax.set_mesh(jax.sharding.Mesh(mesh.devices[:1, :1, :1], mesh.axis_names)):
                results.append(differentiate(params, jax.tree.map(jnp.asarray, batch))[0])
        else:
            placed = jax.device_put(params, params_shardings(CONFIG, mesh))
            results.append(differentiate(placed, sharding.put_batch(batch, mesh, leading=1))[0])
    first = jax.tree.leaves(results[0])
    assert max(np.abs(x).max() for x in first) > 1e-2
    for other in results[1:]:
        for one, same in zip(first, jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, same, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_first_gradient_is_that_of_the_expected_reward_under_the_sampler(settings):
    params = init_params(jax.random.key(0), CONFIG)
    items = make_items(params, settings)
    gradient = find_gradient(params, items)
    before = find_gradient(params, forget_drawn(params, items))
    wrong = []
    for direction in draw_directions(params, gradient):
        expected = difference(params, direction, settings)
        found, without = (
            sum(float((x * d).sum()) for x, d in zip(*map(jax.tree.leaves, (one, direction))))
            for one in (gradient, before)
        )
        assert found == pytest.approx(expected, abs=1e-4)
        wrong.append(abs(without - expected))
    assert max(wrong) > 0.01, "log-probabilities of the policy itself give another gradient"
