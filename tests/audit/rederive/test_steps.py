"""Steps taken again: their metrics, and the state after them."""

import json

import jax.numpy as jnp
import pytest

from halos_jax.audit.rederive import steps
from halos_jax.audit.rederive.steps import Trained
from halos_jax.rounds.context import NOTHING, StageResult
from halos_jax.workdir.manifests import Manifest


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def record(step, loss, **others):
    return {"step": step, "loss/train": loss, "grad_norm": 1.0, **others}


def check(tmp_path, recorded, made, *, is_same=True, first=4):
    folder = tmp_path / "made"
    folder.mkdir()
    write(folder / "metrics.jsonl", *made)
    path = write(tmp_path / "metrics.jsonl", *recorded)
    trained = Trained(None, 2, 3, NOTHING)
    return steps.check_steps(
        path, folder, trained, steps.find_close("float32"), first=first, is_same=is_same
    )


def test_the_metrics_of_the_steps_of_the_round_are_compared(tmp_path):
    recorded = [
        record(4, 9.0),
        {"step": 4, "round": 2, "reward_eval": 1.0},
        record(5, 0.5, examples_per_second=70.0),
        record(6, 0.25, examples_per_second=60.0),
        {"step": 6, "loss/eval": 0.75},
        record(7, 9.0),
    ]
    made = [
        record(5, 0.5),
        record(6, 0.25, examples_per_second=1.0),
        {"step": 6, "loss/eval": 0.75},
    ]
    found = check(tmp_path, recorded, made)
    assert (found.outcome, found.amount) == ("passed", "2 of 3 steps")


@pytest.mark.parametrize(
    ("loss", "is_same", "outcome"),
    [(0.2501, True, "differs"), (0.2501, False, "passed"), (0.26, False, "differs")],
)
def test_an_edited_loss_is_found(tmp_path, loss, is_same, outcome):
    recorded = [record(5, 0.5), record(6, loss)]
    found = check(tmp_path, recorded, [record(5, 0.5), record(6, 0.25)], is_same=is_same)
    assert found.outcome == outcome
    assert outcome == "passed" or found.why.startswith(f"step 6 loss/train: {loss} is recorded")


def test_a_step_that_is_missing_is_found(tmp_path):
    found = check(tmp_path, [record(5, 0.5)], [record(5, 0.5), record(6, 0.25)])
    assert found.why == "metrics.jsonl has no metrics of step 6 under these names"


def test_a_distance_is_a_share_of_the_way_of_a_round():
    begin = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    recorded = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    found = {"a": jnp.array([3.0, 0.5]), "b": jnp.array([4.0])}
    assert steps.measure_apart(found, recorded, begin) == pytest.approx(0.1)
    assert steps.measure_apart(begin, begin, begin) == 0
    assert steps.measure_apart(found, begin, begin) == float("inf")


def test_signs_are_those_of_the_manifest():
    manifest = Manifest(1, metrics={"kl_sft": 0.5})
    close = steps.find_close("bfloat16")
    signs = StageResult({}, {"kl_sft": 0.51})
    assert steps.check_signs(manifest, signs, close, is_same=False).outcome == "passed"
    assert steps.check_signs(manifest, signs, close, is_same=True).outcome == "differs"
