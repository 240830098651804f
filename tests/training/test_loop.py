"""The training loop: order of batches, times of evaluation, resume, the reference's log-probs."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import Config, FeedbackConfig, OptimizerConfig, TrainConfig
from halos_jax.drawn import Drawn
from halos_jax.losses import get_loss
from halos_jax.metrics import is_time
from halos_jax.models import decoder
from halos_jax.models.spec import DecoderConfig, init_params
from halos_jax.models.value import init_value_params
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.packing.layout import LayoutMemory
from halos_jax.training import loop
from halos_jax.types import CHOSEN, REJECTED, Item, TrainState

TINY = DecoderConfig(
    vocab_size=61,
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_mlp=24,
    init_std=0.3,
)
CONFIG = Config(
    progress=False,
    train=TrainConfig(batch_size=3, eval_every=2, row_multiple=64, tokens_per_device=512),
    optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0),
)
COUNT = 14  # 5 steps, the last of two items


class Recorder:
    """Stands in for the metric writer."""

    def __init__(self):
        self.records = []

    def write(self, step, metrics):
        self.records.append((step, {name: float(value) for name, value in metrics.items()}))


def make_items(count, seed):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 61, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    return [Item(draw(2, 6), (draw(1, 8), draw(1, 8)), (CHOSEN, REJECTED)) for _ in range(count)]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (1, 1, 1), sharding.MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


@pytest.fixture(scope="module")
def trainer(mesh):
    loss = get_loss({"name": "dpo", "beta": 0.5})
    return loop.make_trainer(CONFIG, TINY, loss, mesh, total_steps=5)


@pytest.fixture
def start(trainer):
    return loop.start_state(trainer, init_params(jax.random.key(0), TINY))


@pytest.fixture(scope="module")
def data(trainer):
    """Return (training set, held-out set), both with the reference's log-probs."""
    params = init_params(jax.random.key(0), TINY)
    sets = (
        loop.make_dataset(trainer, make_items(COUNT, 1), seed=7),
        loop.make_dataset(trainer, make_items(5, 2), seed=None),
    )
    return [loop.add_reference(trainer, each, params, label="reference") for each in sets]


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_batches_come_in_the_order_of_the_plan_from_any_step(trainer, data):
    train, _ = data
    for first in (0, 3, 5):
        streamed = list(loop.stream_batches(trainer.mesh, train, start=first))
        assert len(streamed) == 5 - first
        for number, batch in enumerate(streamed, first):
            built = build_batch(
                train.items, train.plan, number, reference_logps=train.reference_logps
            )
            for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(built), strict=True):
                assert np.array_equal(ours, theirs)


def test_an_error_of_the_building_thread_is_raised(trainer, data):
    broken = dataclasses.replace(data[0], items=data[0].items[:5])
    with pytest.raises(IndexError):
        list(loop.stream_batches(trainer.mesh, broken))


def test_the_reference_is_the_model_on_each_item_alone(trainer, data):
    train, _ = data
    params = init_params(jax.random.key(0), TINY)
    assert len(train.reference_logps) == COUNT
    for number in (0, 6, 12):
        alone = loop.make_dataset(trainer, [train.items[number]], seed=None)
        batch = jax.tree.map(lambda x: x[0], build_batch(alone.items, alone.plan, 0))
        found = np.asarray(decoder.compute_logps(params, batch, TINY))[0]
        expected = np.concatenate(train.reference_logps[number])
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)


def test_evaluation_at_start_every_and_end(trainer, start, data):
    writer, done = Recorder(), []
    state = loop.run_steps(
        trainer,
        start,
        data[0],
        held_out=data[1],
        writer=writer,
        on_step=lambda state, count: done.append((int(state.step), count)),
    )
    kinds = [
        (step, "eval" if "loss/eval" in metrics else "train") for step, metrics in writer.records
    ]
    assert kinds == [
        (0, "eval"),
        (1, "train"),
        (2, "train"),
        (2, "eval"),
        (3, "train"),
        (4, "train"),
        (4, "eval"),
        (5, "train"),
        (5, "eval"),
    ]
    assert done == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)] and int(state.step) == 5
    # Policy and reference are one at the start: ln 2, whatever the data.
    assert writer.records[0][1]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
    assert writer.records[1][1]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    assert writer.records[-1][1]["loss/eval"] != pytest.approx(math.log(2), abs=1e-3)


def test_metrics_have_the_names_of_halos(trainer, start, data):
    writer = Recorder()
    loop.run_steps(trainer, start, data[0], held_out=data[1], writer=writer)
    train = {
        name for step, metrics in writer.records for name in metrics if "loss/train" in metrics
    }
    held_out = set(writer.records[0][1])
    for split, names in (("train", train), ("eval", held_out)):
        for name in ("chosen", "rejected", "margins", "accuracies"):
            assert f"rewards_{split}/{name}" in names
        assert {f"loss/{split}", f"logps_{split}/chosen", f"logps_{split}/rejected"} <= names
    assert {"counters/lr", "counters/updates", "grad_norm"} <= train
    assert not [name for name in held_out if "train" in name or "counters" in name]
    last = [metrics for _, metrics in writer.records if "loss/train" in metrics][-1]
    assert last["counters/updates"] == 5 and last["counters/stage_examples"] == COUNT


def test_a_resume_is_bit_for_bit_the_uninterrupted_run(trainer, data):
    def run(state, **where):
        writer = Recorder()
        kept = {}

        def keep(state, count):
            kept[count] = jax.tree.map(np.array, state)

        state = loop.run_steps(
            trainer, state, data[0], held_out=data[1], writer=writer, on_step=keep, **where
        )
        return leaves(state), kept, writer.records

    params = lambda: init_params(jax.random.key(0), TINY)  # noqa: E731 (a step donates its state)
    expected, kept, records = run(loop.start_state(trainer, params()))
    for done in (1, 3):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)
        found, _, again = run(jax.device_put(kept[done], shardings), start=done)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        wanted = [record for record in records if record[0] > done]
        assert [drop_times(record) for record in again] == [drop_times(r) for r in wanted]


def drop_times(record):
    step, metrics = record
    return step, {name: v for name, v in metrics.items() if not is_time(name)}


def test_steps_of_a_later_stage_are_counted_on(trainer, start, data):
    writer = Recorder()
    loop.run_steps(trainer, start, data[0], held_out=data[1], writer=writer, first_step=7)
    # No evaluation at the start of a later round: it was made at the end of the one before.
    assert [step for step, m in writer.records if "loss/eval" in m] == [8, 10, 12]
    assert [step for step, m in writer.records if "loss/train" in m] == [8, 9, 10, 11, 12]


def test_evaluation_does_not_depend_on_the_batch_size(trainer, data):
    params = init_params(jax.random.key(5), TINY)
    expected = loop.evaluate(trainer, params, data[1])
    for size in (1, 5):
        train = dataclasses.replace(CONFIG.train, batch_size=size)
        other = dataclasses.replace(trainer, config=dataclasses.replace(CONFIG, train=train))
        again = loop.make_dataset(other, data[1].items, seed=None)
        again = dataclasses.replace(again, reference_logps=data[1].reference_logps)
        found = loop.evaluate(trainer, params, again)
        assert found == pytest.approx(expected, rel=1e-5)


def test_without_held_out_data_nothing_is_evaluated(trainer, start, data):
    writer = Recorder()
    loop.run_steps(trainer, start, data[0], held_out=None, writer=writer)
    assert [step for step, _ in writer.records] == [1, 2, 3, 4, 5]
    assert "examples_per_second" in writer.records[-1][1]


def test_a_callback_may_stop_the_run(trainer, start, data):
    def stop(state, done):
        if done == 2:
            raise KeyboardInterrupt

    writer = Recorder()
    with pytest.raises(KeyboardInterrupt):
        loop.run_steps(trainer, start, data[0], held_out=None, writer=writer, on_step=stop)
    assert [step for step, _ in writer.records] == [1, 2]


# --------------------------------------------------------------------------- what is handed on


def test_a_dataset_is_planned_as_it_is_asked_for_and_its_layout_kept(trainer):
    trainer = dataclasses.replace(trainer, layouts=LayoutMemory())
    items = make_items(COUNT, 1)
    asked = {"seed": 7, "epochs": 3, "max_items": 2 * COUNT + 4}
    settings = {"batch_size": 3, "num_rows": 1, "tokens_per_row": 512, "row_multiple": 64}
    plan = plan_batches(items, **asked, **settings)
    made = loop.make_dataset(trainer, items, **asked)
    assert made.plan == plan and made.items is items
    assert sum(len(row) for step in plan.steps for row in step) == 2 * COUNT + 4
    first = loop.make_dataset(trainer, items, seed=7, recurring="train")
    assert trainer.layouts.find("train") == (first.plan.layout,)
    # With fewer items the same shapes: the layout that is known serves them too.
    few = loop.make_dataset(trainer, items[:9], seed=7, recurring="train")
    alone = loop.make_dataset(trainer, items[:9], seed=7)
    assert few.plan.layout == first.plan.layout != alone.plan.layout


def test_what_was_drawn_from_counts_for_a_loss_with_a_ratio_to_the_sampler_alone(trainer):
    items = make_items(COUNT, 1)
    drawn = [dataclasses.replace(one, drawn=(Drawn(0.7, ()),)) for one in items]
    assert not any(one.drawn for one in loop.make_dataset(trainer, drawn, seed=7).items)
    old = dataclasses.replace(trainer, loss=dataclasses.replace(trainer.loss, old=True))
    assert loop.make_dataset(old, drawn, seed=7).items is drawn


def test_a_pass_reads_the_params_and_the_frozen_part_and_keeps_apart_what_it_finds(trainer):
    params, frozen = object(), object()

    def tell(given, base, batch):
        assert given is params and base is frozen
        return batch.target.astype(np.float32), 0.5 * batch.target

    fake = dataclasses.replace(
        trainer, frozen=frozen, logps=lambda *given: tell(*given)[0], collect=tell
    )
    dataset = loop.make_dataset(fake, make_items(COUNT, 1), seed=7)
    referenced = loop.add_reference(fake, dataset, params, label="reference")
    collected = loop.add_collected(fake, dataset, params, seed=11, label="values")
    assert collected.old.seed == 11 and collected.reference_logps is None
    assert referenced.old is None and referenced.plan == dataset.plan
    for number, item in enumerate(dataset.items):
        for place, response in enumerate(item.responses):
            np.testing.assert_array_equal(referenced.reference_logps[number][place], response)
            np.testing.assert_array_equal(collected.old.logps[number][place], response)
            np.testing.assert_array_equal(collected.old.values[number][place], 0.5 * response)
    batch = next(loop.stream_batches(fake.mesh, collected))
    np.testing.assert_array_equal(batch.old_values, 0.5 * batch.target)


def test_evaluations_read_the_average_and_steps_the_frozen_part(trainer, data):
    frozen, read = object(), []

    def step(state, base, batch):
        assert base is frozen
        moved = state.replace(step=state.step + 1, params={"w": state.params["w"] + 1})
        return moved.replace(ema={"w": state.ema["w"] + 0.5}), {"loss": np.float32(0)}

    def evaluate(params, base, batch):
        assert base is frozen
        read.append(float(params["w"]))
        return {"loss": (np.float32(1), np.float32(1))}

    fake = dataclasses.replace(trainer, frozen=frozen, train_step=step, eval_step=evaluate)
    state = TrainState(0, {"w": np.float32(10)}, None, ema={"w": np.float32(20)})
    loop.run_steps(fake, state, data[0], held_out=data[1], writer=Recorder())
    per_evaluation = len(data[1].plan)
    assert read == [x for x in (20.0, 21.0, 22.0, 22.5) for _ in range(per_evaluation)]


def test_examples_of_a_stage_are_counted_from_its_start_wherever_it_goes_on(trainer, data):
    fake = dataclasses.replace(
        trainer, train_step=lambda state, *_: (state, {"loss": np.float32(0)})
    )
    state = TrainState(3, {}, None)
    counts = []
    for start in (0, 3):
        writer = Recorder()
        loop.run_steps(fake, state, data[0], held_out=None, writer=writer, start=start)
        counts.append({s: metrics["counters/stage_examples"] for s, metrics in writer.records})
    assert counts[0][5] == COUNT and counts[1] == {s: counts[0][s] for s in (4, 5)}


@pytest.mark.parametrize("reference", ["sft", "round_start", "previous_step"])
def test_the_state_holds_a_reference_where_one_moves_and_a_value_head_of_the_seed(mesh, reference):
    rounds = dataclasses.replace(CONFIG.rounds, reference=reference, sync_every=2)
    config = dataclasses.replace(CONFIG, rounds=rounds, seed=5)
    made = {
        name: loop.make_trainer(config, TINY, get_loss({"name": name}), mesh, total_steps=5)
        for name in ("dpo", "sft", "ppo")
    }
    moving = {name: one.abstract_state.reference is not None for name, one in made.items()}
    assert moving == {"dpo": reference == "previous_step", "sft": False, "ppo": moving["dpo"]}
    assert "value" not in made["dpo"].abstract_state.params
    if reference == "sft":
        params = loop.add_value_head(made["ppo"], {"embed": 0})
        expected = init_value_params(jax.random.key(5), TINY.d_model)
        jax.tree.map(np.testing.assert_array_equal, params, {"embed": 0, "value": expected})


def test_a_pass_before_the_first_step_may_be_stopped(trainer, start, data):
    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    stopping = dataclasses.replace(trainer, check=stop)
    train, held_out = data
    with pytest.raises(Stopped):
        loop.add_reference(stopping, train, start.params, label="reference")
    recorder = Recorder()
    with pytest.raises(Stopped):
        loop.run_steps(stopping, start, train, held_out=held_out, writer=recorder)
    assert not recorder.records
    # Between steps it is the callback that stops: it has something to save.
    loop.run_steps(stopping, start, train, held_out=None, writer=recorder)
    assert len(recorder.records) == 5


def test_what_a_stage_moves_is_watched(trainer, data, caplog):
    shares = iter([0.5, 0.03, 0.01, 0.5, 0.5])

    def step(state, *_):
        return state, {"loss": np.float32(0), "moved_params": np.float32(next(shares))}

    fake = dataclasses.replace(trainer, train_step=step, watched=range(9, 11))
    writer = Recorder()
    state = TrainState(7, {}, None)
    loop.run_steps(fake, state, data[0], held_out=None, writer=writer, first_step=7)
    assert [metrics["moved_params"] for _, metrics in writer.records][1:3] == [
        np.float32(0.03),
        np.float32(0.01),
    ]
    assert (
        caplog.text.count("2 % of the weights with a gradient, on average over steps 9 to 10") == 1
    )


def test_the_share_of_the_budget_grows_evenly_and_scales_the_steps(mesh, trainer, data):
    """A round of 5 steps takes the run from 20 % to 70 % of its prompts."""
    train = dataclasses.replace(data[0], progress=(0.2, 0.7))
    assert [train.progress_at(n) for n in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert data[0].progress_at(3) is None
    optimizer = dataclasses.replace(CONFIG.optimizer, name="sgd", warmup_steps=0)
    decaying, moved = dataclasses.replace(optimizer, schedule="linear"), []
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), TINY))
    for one, how, wanted in ((data[0], optimizer, 0), (train, decaying, 1)):
        feedback = FeedbackConfig(min_examples=wanted)
        config = dataclasses.replace(CONFIG, optimizer=how, feedback=feedback)
        made = loop.make_trainer(config, TINY, trainer.loss, mesh, total_steps=5)
        for batch in loop.stream_batches(mesh, one, start=3):  # shares 0.5 and 0.6
            state = loop.start_state(made, jax.tree.map(jax.numpy.asarray, params))
            after, metrics = made.train_step(state, None, batch)
            step = jax.tree.map(lambda new, old: np.asarray(new) - old, after.params, params)
            moved.append((float(metrics["counters/lr"]), jax.tree.leaves(step)))
        # 0 where the tests before have filled jax's cache of functions, which then forgets some.
        assert made.train_step._cache_size() <= 1, "a share is no constant of the program"
    for (full, whole), (rate, part), factor in zip(moved[:2], moved[2:], (0.5, 0.4), strict=True):
        assert rate == pytest.approx(full * factor, rel=1e-6)
        for large, small in zip(whole, part, strict=True):
            np.testing.assert_allclose(small, factor * large, rtol=1e-3, atol=1e-7)
