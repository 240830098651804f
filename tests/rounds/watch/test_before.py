"""The signs of fresh samples: from which policy, of which pairs, and on disk before a step."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from halos_jax.config import RoundsConfig, SamplingConfig
from halos_jax.packing.batches import Plan
from halos_jax.rounds import stages
from halos_jax.rounds.context import NOTHING
from halos_jax.rounds.stages import write_shard
from halos_jax.rounds.watch import before, watched
from halos_jax.training.loop import Dataset
from halos_jax.types import CHOSEN, REJECTED, Item, Prompt, Sample
from halos_jax.workdir.manifests import round_folder
from tests.rounds.stand_ins import CONFIG, make_run

EXACT = dataclasses.replace(
    CONFIG,
    sampling=SamplingConfig(temperature=1.0, top_p=1.0),
    rounds=RoundsConfig(watch_samples=-1),
    loss={"name": "dpo", "beta": 0.5},
)
REWARDS = [[1.0, 0.0, 0.0], [0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]


def make_samples():
    """Return three samples of three prompts; the log-ratio to `SFT` is 0.1 * (3 i + k)."""
    return [
        Sample(
            Prompt(f"p{i}", ()),
            k,
            "",
            (1, i),
            (k, 2),
            "stop",
            reward=REWARDS[i][k],
            sum_logps=-4.0 + 0.1 * (3 * i + k),
            mean_entropy=1.0,
        )
        for i in range(3)
        for k in range(3)
    ]


def make_pair(prompt, chosen, rejected):
    responses = (np.array([chosen, 2]), np.array([rejected, 2]))
    return Item(np.array([1, prompt]), responses, (CHOSEN, REJECTED))


PAIRS = [make_pair(0, 0, 1), make_pair(1, 2, 0)]  # not the best of the second prompt
SFT = [[np.array([-3.0, -1.0])] * 2] * 2  # -4 each
RATIOS = {watched.key_of(one): one.sum_logps + 4 for one in make_samples()}


def measure(run, *, reference=SFT, items=PAIRS, load_sft=lambda: "sft", round=2):
    return before.measure_before(run, make_samples(), items, reference, load_sft, round=round)


@pytest.fixture
def passes(monkeypatch):
    """Note the passes over watched samples, under which everything has -4 nats."""
    called = []

    def compute(run, chosen, params, *, label):
        called.append((params, len(chosen)))
        return [-4.0] * len(chosen)

    monkeypatch.setattr(watched, "compute_sums", compute)
    monkeypatch.setattr(watched, "plan_watched", lambda run, chosen: called.append("planned"))
    return called


def test_the_sft_checkpoint_is_asked_about_the_watched_samples(tmp_path, passes):
    run = make_run(workdir=tmp_path, config=EXACT)
    record = measure(run)
    assert passes == ["planned", ("sft", 9)] and record["round"] == 2
    metrics = record["metrics"]
    assert metrics["kl_sft"] == pytest.approx(0.4)
    assert metrics["kl_sft_per_token"] == pytest.approx(0.2)
    # beta is the loss's; the pairs are the items: p0 0 > 1, p1 2 > 0.
    assert metrics["fresh_margin"] == pytest.approx(0.5 * (-0.1 + 0.2) / 2)
    assert metrics["fresh_accuracy"] == 0.5
    assert metrics["fresh_loss"] == pytest.approx(
        (math.log1p(math.exp(0.05)) + math.log1p(math.exp(-0.1))) / 2
    )
    # p0: two wrong; p1: 1 > 0 right, 1 > 2 wrong, 2 > 0 right.
    assert metrics["implicit_accuracy"] == pytest.approx(2 / 5)
    assert metrics["tied_share"] == pytest.approx(1 / 3) and metrics["entropy"] == 1


def test_without_a_pass_of_the_loss_the_extremes_are_compared(tmp_path, passes):
    metrics = measure(make_run(workdir=tmp_path, config=EXACT), reference=None)["metrics"]
    # p0: 0 against the first of the two worst; p1: 1 against 0.
    assert metrics["fresh_margin"] == pytest.approx(0.5 * (-0.1 + 0.1) / 2)
    assert metrics["kl_sft"] == pytest.approx(0.4)


def test_what_the_loss_has_computed_is_not_computed_again(tmp_path, passes):
    config = dataclasses.replace(EXACT, rounds=RoundsConfig(watch_samples=0))
    metrics = measure(
        make_run(workdir=tmp_path, config=config), load_sft=lambda: pytest.fail("loaded")
    )["metrics"]
    assert passes == ["planned"]
    assert "fresh_margin" in metrics and "reward_best" in metrics
    assert not {"kl_sft", "implicit_accuracy"} & metrics.keys()
    # All samples of the first prompt in a group, as of losses that train on all samples.
    group = Item(np.array([1, 0]), tuple(np.array([k, 2]) for k in range(3)), (5,) * 3)
    samples = make_samples()[:3]
    found = before._find_ratios(
        make_run(config=EXACT), samples, samples, [group], [SFT[0][:1] * 3], pytest.fail
    )
    assert list(found.values()) == pytest.approx([0.0, 0.1, 0.2])


def test_other_sampling_has_another_name():
    warm = dataclasses.replace(EXACT, sampling=SamplingConfig(temperature=0.7, top_p=1.0))
    metrics = before.measure_fresh(warm, make_samples(), make_samples(), RATIOS, PAIRS)
    assert metrics["kl_sampled"] == pytest.approx(0.4) and "kl_sft" not in metrics


def test_signs_on_disk_are_taken_and_the_shapes_known_all_the_same(tmp_path, passes):
    run, folder = make_run(workdir=tmp_path, config=EXACT), round_folder(tmp_path, 2)
    folder.mkdir(parents=True)
    assert before.read_before(folder) == NOTHING
    write_shard(run.workspace, folder / before.FILE, [{"round": 2, "metrics": {"kl_sft": 7.5}}])
    assert measure(run) is None and passes == ["planned"]
    assert before.read_before(folder).metrics == {"kl_sft": 7.5}
    assert json.loads((folder / before.FILE).read_text())["round"] == 2


@pytest.mark.parametrize("reference", ["sft", "round_start", "previous_step"])
@pytest.mark.parametrize("start", [0, 2])
def test_the_train_stage_measures_them_before_its_first_step(
    tmp_path, monkeypatch, reference, start
):
    called = []

    def measure(run, samples, items, logps, load_sft, *, round):
        called.append(("signs", samples, items, logps, load_sft(), round))
        return {"round": round, "metrics": {"kl_sft": 0.5}}

    def run_steps(trainer, state, dataset, *, writer, **_):
        called.append(("steps", list(writer.calls)))
        return state

    layout = SimpleNamespace(kept=-1)  # drawn from the policy itself
    fakes = {
        "make_dataset": lambda *_, **__: Dataset([], Plan(layout, (((0,),),), 1.0)),
        "add_reference": lambda trainer, dataset, params, *, label: dataclasses.replace(
            dataset, reference_logps=f"under {params}"
        ),
        "run_steps": run_steps,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(stages.training, name, fake)
    monkeypatch.setattr(before, "measure_before", measure)
    monkeypatch.setattr(stages, "load_feedback_items", lambda run, folder: PAIRS)
    monkeypatch.setattr(stages, "read_scored", lambda folder: [folder])
    loads = []
    config = dataclasses.replace(EXACT, rounds=RoundsConfig(reference=reference))
    run = make_run(workdir=tmp_path, config=config)
    state = SimpleNamespace(step=7)
    stages.train_stage(
        run,
        state,
        tmp_path,
        round=3,
        start=start,
        held_out=None,
        load_sft=lambda: loads.append("sft") or "sft",
        load_round_start=lambda: "start",
    )
    # From the pass with the reference, only if that is the SFT checkpoint; loaded once for both.
    logps = "under sft" if reference == "sft" else None
    written = [("write", 7, {"round": 3, "kl_sft": 0.5})] if start == 0 else []
    assert called == [("signs", [tmp_path], PAIRS, logps, "sft", 3), ("steps", written)]
    assert loads == ["sft"] and (tmp_path / before.FILE).exists()
