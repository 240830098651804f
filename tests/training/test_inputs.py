"""What the models say of a batch, with a value head: one result for any packing, and who learns."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.losses import get_loss
from halos_jax.models.spec import params_shardings
from halos_jax.models.value import make_value_spec
from halos_jax.training import inputs
from halos_jax.training import step as steps

NEEDS = {
    "sft": ("policy",),
    "dpo": ("policy", "reference"),
    "gspo": ("policy", "old"),
    "bradley-terry": ("scores",),
}


def compare(got, expected, tolerance=2e-5):
    """Hold a loss and its gradient against another's."""
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


def add_value_params(params, config):
    rng = np.random.default_rng(8)
    value = {
        name: (rng.normal(size=leaf.shape) / 4).astype(np.float32)
        for name, leaf in make_value_spec(config.d_model).items()
    }
    return {**params, "value": value}


def run_ppo(batch, params, config, **settings):
    # Clamped, since the drawn log-probs of the policy that sampled are far from this one's.
    loss = get_loss({"name": "ppo", "humanline": True} | settings)
    run = jax.jit(functools.partial(steps.loss_and_gradient, loss=loss, config=config))
    return jax.device_get(run(params, None, batch))


def test_ppo_gives_one_result_for_microbatches_and_devices_with_dropout(
    mesh, make_varied, tiny, params
):
    build = make_varied("ppo")
    policy, results = params, []
    params = add_value_params(policy, tiny)
    with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1])):
        for microbatches in (1, 4):
            results.append(run_ppo(build(1, microbatches), params, tiny, critic_coef=0.5))
        # The critic's error trains the head and not a weight of the policy.
        (_, gradient, _), (_, other, _) = (
            results[0],
            run_ppo(build(1, 1), params, tiny, critic_coef=50.0),
        )
        own, others = gradient.pop("value"), other.pop("value")
        compare((0, other), (0, gradient), tolerance=1e-6)
        for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(100 * one, two, rtol=1e-4, atol=1e-5)
            assert np.abs(one).max() > 0
        gradient["value"] = own
        plain = run_ppo(build(1, 1).replace(noise=None), params, tiny, critic_coef=0.5)
        assert abs(plain[0] - results[0][0]) > 1e-4, "dropout changes nothing"
    placed = {
        **jax.device_put(policy, params_shardings(tiny, mesh)),
        "value": jax.device_put(params["value"], sharding.replicated(mesh)),
    }
    batch = sharding.put_batch(build(4, 2), mesh, leading=1)
    results.append(run_ppo(batch, placed, tiny, critic_coef=0.5))
    for other in results[1:]:
        compare(other[:2], results[0][:2])
        for key in results[0][2].keys() - {"loss"}:
            ratios = [x[2][key][0] / max(x[2][key][1], 1) for x in (results[0], other)]
            np.testing.assert_allclose(*ratios, rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_policy_that_collects_is_that_of_the_logps_and_evaluation_drops_nothing(
    one, make_varied, tiny, params
):
    batch = make_varied("ppo")(1, 2)
    params = add_value_params(params, tiny)
    logps, values = inputs.compile_collect(tiny, one)(params, None, batch.replace(noise=None))
    expected = inputs.compile_logps(tiny, one)(params, None, batch)
    np.testing.assert_allclose(logps, expected, atol=1e-5)
    evaluate = steps.compile_eval_step(get_loss({"name": "ppo"}), tiny, one)
    sums = jax.device_get(evaluate(params, None, batch.replace(noise=None, old_values=None)))
    # Without values of another time the present ones stand in for them.
    np.testing.assert_allclose(sums["val/mean"][0], np.sum(values), rtol=1e-4)
    np.testing.assert_allclose(sums["val/vpred"][0], sums["val/mean"][0], rtol=1e-6)


def test_a_correction_reads_who_sampled_and_a_stand_in_for_the_old_policy(monkeypatch):
    told = []
    monkeypatch.setattr(inputs.decoder, "compute_logps", lambda params, batch, config: "policy")
    monkeypatch.setattr(inputs.decoder, "encode_responses", lambda params, batch, config: "hidden")
    monkeypatch.setattr(
        inputs.decoder, "compute_statistics", lambda *given: told.append(given) or ("policy", "p2")
    )
    batch = types.SimpleNamespace(reference_logps="ref", old_logps="mu", proximal_logps="start")

    def find(name, correction, batch=batch):
        loss = get_loss({"name": name, "correction": correction})
        found = inputs.compute_inputs({}, None, batch, loss, None)
        return [getattr(found, x) for x in ("policy", "old", "sampled", "alignment")]

    assert find("dapo", "token_tis") == ["policy", "start", "mu", None]
    assert find("dapo", "none") == ["policy", "mu", None, None]
    evaluated = types.SimpleNamespace(old_logps="mu", proximal_logps=None)
    assert find("dapo", "token_tis", evaluated) == ["policy", "mu", "mu", None]
    pair = types.SimpleNamespace(reference_logps="ref", old_logps="mu", proximal_logps=None)
    assert find("dpo", "sequence_tis", pair) == ["policy", None, "mu", None]
    assert find("dpo", "wpo", pair) == ["policy", None, None, "p2"] and len(told) == 1
    assert told[0][1] == "hidden" and told[0][-1] == "alignment"


@pytest.mark.parametrize(("name", "needs"), NEEDS.items())
def test_a_loss_reads_what_it_needs_of_the_batch_and_nothing_else(monkeypatch, name, needs):
    monkeypatch.setattr(inputs.decoder, "compute_logps", lambda params, batch, config: "policy")
    monkeypatch.setattr(inputs.decoder, "compute_scores", lambda params, batch, config: "scores")
    batch = types.SimpleNamespace(reference_logps="reference", old_logps="old")
    found = inputs.compute_inputs({}, None, batch, get_loss({"name": name}), None)
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    assert {key: value for key, value in fields.items() if value is not None} == {
        key: key for key in needs
    }


def test_results_are_read_when_the_next_ones_are_under_way():
    events = []

    def start():
        for number in range(3):
            events.append(f"start {number}")
            yield (np.full((2,), number),)

    for (result,) in inputs.read_behind(start()):
        events.append(f"read {int(result[0])}")
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert list(inputs.read_behind([])) == []
