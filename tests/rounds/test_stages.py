"""Each stage reads what the one before left on disk, and leaves its own file."""

import dataclasses
import json
import os
import weakref
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import pytest

from halos_jax import storage
from halos_jax.config import CheckpointConfig, Config, FeedbackConfig, RewardConfig
from halos_jax.data.records import formats as records
from halos_jax.devices import DeviceError
from halos_jax.packing.transforms import NOTHING
from halos_jax.rewards.labels import Labels, make_score_rows
from halos_jax.rounds import stages
from halos_jax.types import CHOSEN, REJECTED
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import FileRecord, Manifest, round_folder
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_run, make_sample


@pytest.fixture
def sampled(monkeypatch):
    """Replace the sampler; return the list of the shards that it was asked for."""
    asked = []

    def sample_shard(sampler, weights, prompts, *, seed, round, generator, logps_of, on_sample):
        asked.append(([prompt.prompt_id for prompt in prompts], weights, seed, round))
        return [make_sample(p, i, 1 + i + int(p.prompt_id[1:])) for p in prompts for i in range(2)]

    monkeypatch.setattr(stages, "sample_shard", sample_shard)
    return asked


def draw(run, params, prompts, folder, round):
    rollouts = run.rollouts
    return stages.sample_prompts(rollouts, params, prompts, folder, round=round, label="samples")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_sampled_in_shards_and_shards_on_disk_are_taken(tmp_path, sampled):
    run = make_run()
    first = draw(run, "params", PROMPTS, tmp_path, 2)
    weights = "unstacked params"
    assert sampled == [
        (["p0", "p1"], weights, 3, 2),
        (["p2", "p3"], weights, 3, 2),
        (["p4"], weights, 3, 2),
    ]
    assert [(s.prompt.prompt_id, s.sample_id) for s in first] == [
        (f"p{i}", j) for i in range(5) for j in range(2)
    ]
    (tmp_path / "samples.shard-0001.jsonl").unlink()
    sampled.clear()
    again = draw(run, "params", PROMPTS, tmp_path, 2)
    assert again == first and [ids for ids, *_ in sampled] == [["p2", "p3"]]
    # With every shard there, the weights are not even copied.
    run = make_run(sampler=None)
    assert draw(run, None, PROMPTS, tmp_path, 2) == first


def test_shards_of_another_size_are_sampled_again(tmp_path, sampled):
    run = make_run()
    draw(run, "params", PROMPTS, tmp_path, 2)
    sampled.clear()
    larger = dataclasses.replace(CONFIG.sampling, shard_prompts=3)
    run = make_run(config=dataclasses.replace(CONFIG, sampling=larger))
    again = draw(run, "params", PROMPTS, tmp_path, 2)
    assert [ids for ids, *_ in sampled] == [["p0", "p1", "p2"], ["p3", "p4"]]
    assert [(s.prompt.prompt_id, s.sample_id) for s in again] == [
        (f"p{i}", j) for i in range(5) for j in range(2)
    ]


def test_a_signal_stops_between_two_shards(tmp_path, monkeypatch, sampled):
    stop = StopSignal()
    run = make_run(stop=stop)
    original = stages.sample_shard

    def sample_then_stop(*arguments, **options):
        stop.handle()
        return original(*arguments, **options)

    monkeypatch.setattr(stages, "sample_shard", sample_then_stop)
    with pytest.raises(Interrupted):
        draw(run, "params", PROMPTS, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.shard-0000.jsonl"]


def test_memory_that_ends_in_sampling_names_the_round_and_the_slots(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(stages, "sample_shard", fail)
    with pytest.raises(DeviceError, match=r"in sampling \(samples, round 4\).* sampling\.slots"):
        draw(make_run(), "params", PROMPTS, tmp_path, 4)


def test_a_shard_of_other_prompts_is_sampled_again(tmp_path, sampled, caplog):
    """Shards of two prompts, then of three: the old ones hold what is not asked for any more."""
    caplog.set_level("INFO")
    first = draw(make_run(), "params", PROMPTS, tmp_path, 1)
    sampled.clear()
    sizes = dataclasses.replace(CONFIG.sampling, shard_prompts=3)
    larger = make_run(config=dataclasses.replace(CONFIG, sampling=sizes))
    again = draw(larger, "params", PROMPTS, tmp_path, 1)
    assert [ids for ids, *_ in sampled] == [["p0", "p1", "p2"], ["p3", "p4"]] and again == first
    assert caplog.text.count("holds samples of other prompts; sampling it again") == 2


def test_a_signal_stops_inside_of_a_shard_which_is_sampled_again(tmp_path, monkeypatch, sampled):
    stop = StopSignal()
    stop.place = "round 1, stage sample"

    def sample_some(*arguments, on_sample, **options):
        on_sample(1)
        stop.handle()
        on_sample(1)
        raise AssertionError("it went on")

    monkeypatch.setattr(stages, "sample_shard", sample_some)
    with pytest.raises(Interrupted, match="stopped by SIGTERM in round 1, stage sample; saved"):
        draw(make_run(stop=stop), "params", PROMPTS, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_sample_score_feedback_hand_files_to_each_other(tmp_path, sampled):
    run = make_run()
    files, metrics, _ = stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    assert files == {"samples.jsonl": 10} and len(read(tmp_path / "samples.jsonl")) == 10
    lengths = [2 + i + j for i in range(5) for j in range(2)]
    assert metrics == {
        "samples": 10,
        "response_tokens_mean": sum(lengths) / 10,
        "truncated": sum(length > 4 for length in lengths),
    }

    files, metrics, _ = stages.score_stage(run.rollouts, tmp_path)
    rewards = [1.0 + i + j for i in range(5) for j in range(2)]
    scores = read(tmp_path / "scores.jsonl")
    assert files == {"scores.jsonl": 10} and metrics["reward_train_mean"] == sum(rewards) / 10
    assert [score["reward"] for score in scores] == rewards
    assert [(score["prompt_id"], score["sample_id"]) for score in scores] == [
        (f"p{i}", j) for i in range(5) for j in range(2)
    ]

    files, metrics, _ = stages.feedback_stage(run.rollouts, tmp_path, 1)
    feedback = read(tmp_path / "feedback.jsonl")
    assert files == {"feedback.jsonl": 5} == {"feedback.jsonl": len(feedback)}
    assert metrics["feedback_pairs"] == 5 and metrics["feedback_ties"] == 0
    for number, record in enumerate(feedback):
        pair = records.preference_from_record(record)
        assert pair.prompt.prompt_id == f"p{number}"
        assert (pair.chosen.sample_id, pair.rejected.sample_id) == (1, 0)
        assert pair.chosen.reward - pair.rejected.reward == 1.0

    items = stages.load_feedback_items(run, tmp_path)
    assert len(items) == 5 and items[0].roles == (CHOSEN, REJECTED)
    # The very tokens that were sampled.
    assert [ids.tolist() for ids in items[0].responses] == [[10, 11, 4], [10, 4]]
    assert items[0].prompt_ids.tolist() == [1, 2]


def test_scored_samples_are_read_once_and_again_when_a_file_is_another(tmp_path, monkeypatch):
    run = make_run()
    samples = [make_sample(prompt, 0, 1) for prompt in PROMPTS]
    read, real = [], stages.read_samples
    monkeypatch.setattr(stages, "read_samples", lambda path: read.append(path) or real(path))
    stages.write_rows(
        run.workspace, tmp_path / "samples.jsonl", map(records.sample_to_record, samples)
    )

    def score(reward):
        rows = make_score_rows(samples, Labels([reward] * len(samples)))
        stages.write_rows(run.workspace, tmp_path / "scores.jsonl", rows)

    score(1.0)
    first = stages.read_scored(tmp_path)
    first.pop()  # a list of the caller's own
    assert [one.reward for one in stages.read_scored(tmp_path)] == [1.0] * len(samples)
    assert len(read) == 1
    score(2.0)
    assert [one.reward for one in stages.read_scored(tmp_path)] == [2.0] * len(samples)
    monkeypatch.setattr(stages, "_LARGE", 10)
    assert len(stages.read_scored(tmp_path)) == len(samples) and len(read) == 3


def test_a_sample_without_a_reward_is_left_out_and_counted(tmp_path, sampled, caplog):
    # The even samples of p0 and p1 cannot be labelled: two prompts have no pair.
    def score(samples):
        hidden = [s.prompt.prompt_id in ("p0", "p1") and s.sample_id == 0 for s in samples]
        return [None if hide else 1.0 + s.sample_id for s, hide in zip(samples, hidden)]

    config = dataclasses.replace(CONFIG, reward=RewardConfig(max_unlabelled=0.25))
    run = make_run(scorer=score, config=config)
    stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    files, metrics, _ = stages.score_stage(run.rollouts, tmp_path)
    assert files == {"scores.jsonl": 10} and metrics["unlabelled_train"] == 2
    assert metrics["reward_train_mean"] == (5 * 2 + 3 * 1) / 8
    assert [row["reward"] for row in read(tmp_path / "scores.jsonl")] == [None, 2] * 2 + [1, 2] * 3
    assert "2 of 10 samples have no reward" in caplog.text
    files, metrics, _ = stages.feedback_stage(run.rollouts, tmp_path, 1)
    assert metrics["feedback_unlabelled"] == 2 and metrics["feedback_single"] == 2
    assert [row["prompt_id"] for row in read(tmp_path / "feedback.jsonl")] == ["p2", "p3", "p4"]


def test_binary_and_scalar_feedback(tmp_path, sampled):
    for kind, count in (("binary", 10), ("scalar", 10)):
        config = Config(
            progress=False, sampling=CONFIG.sampling, feedback=FeedbackConfig(type=kind)
        )
        run = make_run(config=config)
        stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
        stages.score_stage(run.rollouts, tmp_path)
        files, _, _ = stages.feedback_stage(run.rollouts, tmp_path, 1)
        kinds = {record["type"] for record in read(tmp_path / "feedback.jsonl")}
        assert files == {"feedback.jsonl": count} and kinds == {f"{kind}_feedback"}


def test_a_round_of_ties_has_nothing_to_train_on(tmp_path, sampled, caplog):
    run = make_run(workdir=tmp_path, scorer=lambda samples: [0.5] * len(samples))
    stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    stages.score_stage(run.rollouts, tmp_path)
    files, metrics, _ = stages.feedback_stage(run.rollouts, tmp_path, 1)
    assert files == {"feedback.jsonl": 0} and metrics["feedback_ties"] == 5
    assert "round 1: no pair of 5 prompts: 0 have fewer than two rewards" in caplog.text
    assert stages.load_feedback_items(run, tmp_path) == []
    state = SimpleNamespace(step=4)
    trained = stages.train_stage(
        run,
        state,
        tmp_path,
        round=1,
        start=0,
        held_out=None,
        load_sft=pytest.fail,
        load_round_start=pytest.fail,
    )
    assert trained is state and "no pairs to train on" in caplog.text
    (_, step, signs), flushed = run.writer.calls
    # The signs of what was sampled, of which there are as many all the same.
    assert step == 4 and signs["round"] == 1 and signs["tied_share"] == 1
    assert flushed == ("flush",) and run.checkpoints.calls == []


def test_the_end_of_a_round_is_saved():
    run, state = make_run(), SimpleNamespace(step=4)
    stages.save_round(run, state, 1)
    position = {"round": 1, "in_stage": False, "layouts": {}, "step": 4}
    assert run.checkpoints.calls == [("save", 4, state, position)]


def test_a_step_is_saved_where_it_is_due_or_the_run_must_stop():
    config = Config(checkpoint=CheckpointConfig(every=3))
    state = SimpleNamespace(step=17)
    run = make_run(config=config)
    for done in range(1, 7):
        stages.after_step(run, state, done, round=2, total=6)
    # Not after the last one: the round's own checkpoint follows.
    position = {"round": 2, "in_stage": True, "stage_step": 3, "layouts": {}, "step": 17}
    assert run.checkpoints.calls == [("save", 17, state, position)]
    assert run.writer.calls == [("flush",)]

    run = make_run()
    run.stop.handle()
    with pytest.raises(Interrupted):
        stages.after_step(run, state, 1, round=2, total=6)
    position = {"round": 2, "in_stage": True, "stage_step": 1, "layouts": {}, "step": 17}
    assert run.checkpoints.calls == [("save", 17, state, position), ("finish",)]


def test_a_shard_is_known_before_it_is_there(tmp_path, sampled, monkeypatch):
    """Killed between the two, or sampled whole: the next process finds what the ledger says."""
    run = make_run(ledger=open_ledger(tmp_path))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    assert list(open_ledger(tmp_path).entries) == ["samples.shard-0000.jsonl"]
    stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    for number in range(3):
        path = tmp_path / f"samples.shard-{number:04d}.jsonl"
        assert run.workspace.ledger.find(path)["sha256"] == storage.hash_file(path)
    assert run.workspace.ledger.find(tmp_path / "samples.jsonl") is None  # its manifest names it


def test_only_the_shards_of_the_label_are_removed(tmp_path):
    for name in ("samples.shard-0000.jsonl", "eval.shard-0000.jsonl", "samples.jsonl"):
        (tmp_path / name).touch()
    stages.remove_shards(tmp_path, "samples")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval.shard-0000.jsonl", "samples.jsonl"]


def test_the_shards_of_a_test_stay_until_it_is_committed(tmp_path):
    """A run that is killed in the final test passes by the last round again when it resumes."""
    run, folder = make_run(workdir=tmp_path), round_folder(tmp_path, 2)
    folder.mkdir(parents=True)
    labels = ("eval", "signs", "test")
    for label in labels:
        (folder / f"{label}.shard-0000.jsonl").touch()
    done = Manifest(2, files={"eval.jsonl": FileRecord("", 1)})
    stages.remove_eval_shards(run, done)
    assert [path.name for path in folder.iterdir()] == ["test.shard-0000.jsonl"]
    stages.remove_eval_shards(run, dataclasses.replace(done, files={"test.jsonl": None}))
    assert not list(folder.iterdir())


def test_the_sft_params_are_let_go_before_values_are_computed(tmp_path, monkeypatch):
    """Beside the train state, a device may have room for one more policy alone."""
    run, held = make_run(workdir=tmp_path), []
    loss = SimpleNamespace(items=run.trainer.loss.items, value=True, reference=True, old=True)
    run = dataclasses.replace(run, trainer=SimpleNamespace(loss=loss))

    class Loaded:
        pass

    def load_sft():
        loaded = Loaded()
        held.append(weakref.ref(loaded))
        return loaded

    def add_reference(trainer, dataset, params, *, label):
        assert params is held[0]()
        return dataset

    def measure(run, samples, items, logps, sft, *, round):
        assert logps == "logps" and sft() is held[0]()

    def add_collected(trainer, dataset, params, *, seed, label):
        assert held[0]() is None and params == "start"
        return "collected"

    dataset = SimpleNamespace(plan=MagicMock(fill=1.0), reference_logps="logps")
    dataset.plan.layout.kept = NOTHING
    monkeypatch.setattr(stages, "read_scored", lambda folder: [])
    monkeypatch.setattr(stages.training, "make_dataset", lambda *given, **named: dataset)
    monkeypatch.setattr(stages.training, "add_reference", add_reference)
    monkeypatch.setattr(stages.training, "add_collected", add_collected)
    monkeypatch.setattr(stages.before, "measure_before", measure)
    assert (
        stages.prepare_round(run, ["item"], tmp_path, 1, load_sft, lambda: "start") == "collected"
    )
    assert len(held) == 1


def test_other_processes_write_nothing(tmp_path, sampled):
    run = make_run(is_writer=False)
    stages.sample_stage(run.rollouts, "params", PROMPTS, tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_what_a_policy_has_sampled_goes_when_it_is_trained_again(tmp_path):
    kept = ["0001/samples.jsonl", "0001/manifest.json", "0000/eval.shard-0000.jsonl"]
    gone = ["0001/eval.shard-0000.jsonl", "0002/samples.shard-0000.jsonl", "0002/samples.jsonl"]
    for name in kept + gone:
        path = tmp_path / "rounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    stages.forget_samples(make_run(workdir=tmp_path), 1)
    left = {str(p.relative_to(tmp_path / "rounds")) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(kept) and not (tmp_path / "rounds" / "0002").exists()
