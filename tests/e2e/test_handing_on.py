"""What the parts of an online run hand to each other, with stand-ins for what takes long.

A run compared with another run of the same program cannot see what both do wrong. So each thing
that is handed on has a value here that nothing else has.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest

from halos_jax.config import FeedbackConfig, OptimizerConfig, TrainConfig
from halos_jax.losses import get_loss
from halos_jax.packing import transforms
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rounds import evaluation, stages
from halos_jax.rounds import progress as progress_module
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.context import NOTHING, StageResult
from halos_jax.rounds.pending import PendingRound
from halos_jax.rounds.progress import Progress
from halos_jax.rounds.proof import origin as origins
from halos_jax.tasks import online as loop
from halos_jax.training.loop import Dataset
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_run, make_sample


class Plan(list):
    """Stands for a plan of as many steps as it has elements."""

    fill = 0.5
    layout = SimpleNamespace(kept=transforms.NOTHING)


def make_trainer(loss):
    decoder = SimpleNamespace(max_positions=0)
    return SimpleNamespace(
        loss=get_loss({"name": loss}), layouts=LayoutMemory(), decoder=decoder, frozen="frozen"
    )


def replace_known(dataset, name, params):
    known = (*dataset.known, (name, params))
    return SimpleNamespace(plan=dataset.plan, known=known, reference_logps=f"of {name}")


@pytest.fixture
def unwatched(monkeypatch):
    """Leave out the signs of a round, which read files that the stand-ins do not write."""
    monkeypatch.setattr(stages, "read_scored", lambda folder: [])
    monkeypatch.setattr(stages.before, "measure_before", lambda *given, **how: None)
    monkeypatch.setattr(stages.before, "read_before", lambda folder: NOTHING)
    monkeypatch.setattr(loop.after, "add_staleness", lambda run, state, done, round: done)


@pytest.mark.parametrize("loss", ["dpo", "ppo"])
@pytest.mark.usefixtures("unwatched")
def test_training_gets_what_the_round_has(tmp_path, monkeypatch, loss):
    events, saved, after = [], [], SimpleNamespace(step=12)
    run = make_run(
        config=dataclasses.replace(CONFIG, train=TrainConfig(epochs=3)),
        trainer=make_trainer(loss),
        writer=SimpleNamespace(flush=lambda: events.append("flush")),
        checkpoints=SimpleNamespace(save=lambda *given: saved.append(given)),
    )
    held_out, items, seeds = object(), [object()] * 5, set()

    def make_dataset(trainer, given, *, seed, epochs, recurring):
        assert (trainer, given, epochs, recurring) == (run.trainer, items, 3, "train")
        seeds.add(seed)
        return SimpleNamespace(plan=Plan(range(6)), known=(), reference_logps=None)

    def add_reference(trainer, dataset, params, *, label):
        assert trainer is run.trainer
        return replace_known(dataset, "reference", params)

    def add_collected(trainer, dataset, params, *, seed, label):
        seeds.add(seed)
        return replace_known(dataset, "values", params)

    def run_steps(trainer, state, dataset, *, start, first_step, on_step, **others):
        collected = [("values", "start")] if loss == "ppo" else []
        assert dataset.known == (("reference", "sft"), *collected)
        assert (trainer, state.step, start, first_step) == (run.trainer, 8, 2, 6)
        assert others["held_out"] is held_out and others["writer"] is run.writer
        run.stop.handle()
        on_step(after, 6)  # the last step of six: the stage's own checkpoint follows
        return after

    def measure_before(run, samples, given, logps, load_sft, *, round):
        assert (samples, given, load_sft(), round) == ("samples", items, "sft", 4)
        assert logps == "of reference"

    monkeypatch.setattr(stages, "load_feedback_items", lambda *given: items)
    monkeypatch.setattr(stages, "read_scored", lambda folder: "samples")
    monkeypatch.setattr(stages.before, "measure_before", measure_before)
    for function in (make_dataset, add_reference, add_collected, run_steps):
        monkeypatch.setattr(stages.training, function.__name__, function)
    found = stages.train_stage(
        run,
        SimpleNamespace(step=8),
        tmp_path,
        round=4,
        start=2,
        held_out=held_out,
        load_sft=lambda: "sft",
        load_round_start=lambda: "start",
    )
    assert found is after and events == ["flush"] and not saved
    assert len(seeds) == 1, "values are dropped out by the seed of the batches"
    stages.save_round(run, after, 4)
    [(step, state, position)] = saved
    assert (step, state, position["round"], position["in_stage"]) == (12, after, 4, False)


class Seen(Exception):
    """Ends a stage when what it hands on is known."""


@pytest.mark.usefixtures("unwatched")
def test_every_round_of_every_seed_takes_its_examples_in_an_order_of_its_own(tmp_path, monkeypatch):
    seeds = []

    def make_dataset(trainer, items, *, seed, **others):
        seeds.append(seed)
        raise Seen

    monkeypatch.setattr(stages, "load_feedback_items", lambda *given: [object()])
    monkeypatch.setattr(stages.training, "make_dataset", make_dataset)
    for seed, round in ((3, 1), (3, 2), (4, 1), (3, 1)):
        run = make_run(config=dataclasses.replace(CONFIG, seed=seed))
        given = {"held_out": None, "load_sft": dict, "load_round_start": dict}
        with pytest.raises(Seen):
            stages.train_stage(
                run, SimpleNamespace(step=0), tmp_path, round=round, start=0, **given
            )
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]


@pytest.mark.parametrize(("wanted", "expected"), [(1, (0.25, 0.75)), (0, None)])
@pytest.mark.usefixtures("unwatched")
def test_a_rate_that_follows_the_budget_knows_the_rounds_share(
    tmp_path, monkeypatch, wanted, expected
):
    """The manifest says what the round uses: prompts 2 and 3, of the run's four from 1 on."""
    config = dataclasses.replace(
        CONFIG,
        feedback=FeedbackConfig(min_examples=wanted),
        optimizer=OptimizerConfig(schedule="linear"),
    )
    run = make_run(
        config=config, trainer=make_trainer("dpo"), prompts=PROMPTS, budget=Budget(9, 1, 1)
    )
    manifests.save_manifest(tmp_path, Manifest(round=4, start=2, stop=4))
    items = [object()]

    def run_steps(trainer, state, dataset, **others):
        raise Seen(dataset.progress)

    monkeypatch.setattr(stages, "load_feedback_items", lambda *given: items)
    dataset = Dataset(items, Plan(range(2)))
    monkeypatch.setattr(stages.training, "make_dataset", lambda *given, **how: dataset)
    monkeypatch.setattr(stages.training, "needs_reference", lambda *given, **how: False)
    monkeypatch.setattr(stages.training, "run_steps", run_steps)
    given = {"held_out": None, "load_sft": dict, "load_round_start": dict}
    with pytest.raises(Seen) as seen:
        stages.train_stage(run, SimpleNamespace(step=8), tmp_path, round=4, start=0, **given)
    assert seen.value.args == (expected,)


@pytest.mark.parametrize("reference", ["sft", "round_start"])
def test_the_reference_is_the_policy_that_the_config_names(tmp_path, monkeypatch, reference):
    rounds = dataclasses.replace(CONFIG.rounds, reference=reference)
    run = make_run(config=dataclasses.replace(CONFIG, rounds=rounds), trainer=make_trainer("dpo"))

    def add_reference(trainer, dataset, params, *, label):
        assert params == reference
        raise Seen

    monkeypatch.setattr(stages, "load_feedback_items", lambda *given: [object()])
    plan = SimpleNamespace(plan=Plan(range(6)))
    monkeypatch.setattr(stages.training, "make_dataset", lambda *given, **options: plan)
    monkeypatch.setattr(stages.training, "add_reference", add_reference)
    with pytest.raises(Seen):
        stages.train_stage(
            run,
            SimpleNamespace(step=0),
            tmp_path,
            round=2,
            start=0,
            held_out=None,
            load_sft=lambda: "sft",
            load_round_start=lambda: "round_start",
        )


def test_feedback_is_made_as_the_config_says():
    samples = [
        dataclasses.replace(make_sample(PROMPTS[n // 4], n % 4, 1 + n % 3), reward=float(n * n))
        for n in range(16)
    ]

    def feedback(round=1, **settings):
        config = dataclasses.replace(CONFIG, feedback=FeedbackConfig(**settings))
        return stages.make_feedback(config, samples, round)[0]

    assert [len(feedback(mode=mode)) for mode in ("random", "max", "all")] == [8, 4, 24]
    assert len(feedback(mode="max", threshold=30.0)) == 3  # 9 of the first prompt
    first, second = (feedback(round, mode="random") for round in (1, 2))
    pairs = [{frozenset((x["reward_A"], x["reward_B"])) for x in one} for one in (first, second)]
    assert pairs[0] != pairs[1], "another round pairs alike"
    assert feedback(1, mode="all") != feedback(2, mode="all"), "another round orders a pair alike"
    for scope, desirable in (("file", [0, 4]), ("prompt", [2, 2])):
        rows = feedback(type="binary", threshold="mean", scope=scope)
        assert [sum(row["label"] for row in rows[n : n + 4]) for n in (0, 12)] == desirable


def test_a_rounds_feedback_is_drawn_by_its_number(tmp_path, monkeypatch):
    rounds = []
    monkeypatch.setattr(stages, "read_scored", lambda folder: [])
    monkeypatch.setattr(stages, "report_feedback", lambda *given: None)
    monkeypatch.setattr(
        stages, "make_feedback", lambda config, scored, round: rounds.append(round) or ([], {})
    )
    stages.feedback_stage(make_run().rollouts, tmp_path, 7)
    assert rounds == [7]


def test_items_are_of_the_losss_kind_with_its_control_tokens(tmp_path, monkeypatch):
    (tmp_path / "feedback.jsonl").write_text("{}\n")
    monkeypatch.setattr(stages, "load_items", lambda *given, control: (*given, control))
    run = make_run(trainer=make_trainer("csft"))
    found = stages.load_feedback_items(run, tmp_path)
    path, control = str(tmp_path / "feedback.jsonl"), ("<|good|>", "<|bad|>")
    assert found == ("controlled", path, run.policy.renderer, run.lengths, control)


def test_samples_are_of_the_generator_that_the_config_names(tmp_path, monkeypatch):
    asked = []

    def sample_shard(*given, seed, round, generator, logps_of, on_sample):
        asked.append((seed, round, generator))
        return []

    monkeypatch.setattr(stages, "sample_shard", sample_shard)
    for number, name in enumerate(("", "me")):
        sampling = dataclasses.replace(CONFIG.sampling, generator=name)
        model = dataclasses.replace(CONFIG.model, path="policy")
        config = dataclasses.replace(CONFIG, sampling=sampling, model=model)
        run, folder = make_run(config=config), tmp_path / str(number)
        folder.mkdir()
        stages.sample_prompts(run.rollouts, None, PROMPTS[:1], folder, round=6, label="samples")
    assert asked == [(3, 6, "policy"), (3, 6, "me")]


class Recorded:
    """Stands for the stages of a round: notes what each is given, and gives what it is told to."""

    def __init__(self, monkeypatch, trained):
        self.calls = []
        for name in vars(stages):
            if name.endswith("_stage") or name in ("forget_samples", "save_round"):
                monkeypatch.setattr(stages, name, self._note(name, trained))
        monkeypatch.setattr(evaluation, "evaluate_stage", self._note("evaluate_stage", trained))
        monkeypatch.setattr(loop.after, "add_staleness", self._note("add_staleness", trained))
        monkeypatch.setattr(stages, "remove_shards", lambda *given: None)
        monkeypatch.setattr(
            loop.manifests,
            "commit_stage",
            lambda folder, manifest, stage, **done: self._commit(manifest, stage),
        )

    def _note(self, name, trained):
        def call(run, *given, **options):
            self.calls.append((name, *given, options))
            files, metrics = {"scores.jsonl": 2}, {"samples": 2, "response_tokens_mean": 1.0}
            return trained if name == "train_stage" else StageResult(files, metrics)

        return call

    def _commit(self, manifest, stage):
        self.calls.append(("commit", stage))
        return dataclasses.replace(manifest, stages=(*manifest.stages, stage))

    @property
    def names(self):
        return [call[1] if call[0] == "commit" else call[0] for call in self.calls]

    def find(self, name):
        [call] = [call for call in self.calls if call[0] == name]
        return call[1:]


def make_state(number):
    """Return a state whose params, average and step tell which it is."""
    params = {"policy": f"params {number}", "value": f"head {number}"}
    return SimpleNamespace(params=params, ema=None, step=number)


@pytest.mark.usefixtures("unwatched")
def test_a_round_hands_its_policy_from_stage_to_stage(tmp_path, monkeypatch):
    before, trained = make_state(10), make_state(20)
    recorded = Recorded(monkeypatch, trained)
    monkeypatch.setattr(loop, "merge_adapter", lambda params, frozen: ("merged", params, frozen))
    monkeypatch.setattr(loop, "take_exported", lambda state: f"exported {state.step}")
    monkeypatch.setattr(loop, "explain_memory", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(progress_module, "report_round", lambda *given: None)
    start, end, average = (origins.Origin(name) for name in ("start", "end", "average"))
    monkeypatch.setattr(loop, "identify_start", lambda *given: start)
    monkeypatch.setattr(loop, "identify_end", lambda *given: (end, average))
    settle = progress_module.commit_round

    def commit_round(run, pending):
        recorded.calls.append(("settle", pending.manifest.round))
        return settle(run, pending)

    monkeypatch.setattr(progress_module, "commit_round", commit_round)
    run = make_run(
        trainer=make_trainer("dpo"),
        prompts=PROMPTS,
        workdir=tmp_path,
        checkpoints=SimpleNamespace(finish=lambda: recorded.calls.append(("finish",))),
        layouts=LayoutMemory(),
        budget=Budget(total_prompts=len(PROMPTS), prompts_per_round=1),
    )
    before_train = ("sample", "score", "feedback")
    pending = PendingRound(Manifest(round=2, stages=before_train), StageResult({}, {}))
    progress = Progress(before, 2, stage_step=3, pending=pending)
    manifest = Manifest(round=3, start=1, stop=4)
    held_out = object()
    round_folder(tmp_path, 3).mkdir(parents=True)
    loop.run_round(run, progress, manifest, held_out)
    # The round before is settled when this one's prompts are sampled, before anything of this one
    # is committed.
    assert recorded.names == [
        *("sample_stage", "settle", "finish", "train", "evaluate"),
        *("sample", "score_stage", "score", "feedback_stage", "feedback"),
        *("forget_samples", "train_stage", "save_round", "evaluate_stage", "add_staleness"),
    ]
    assert recorded.find("settle") == (2,)
    policy = ("merged", {"policy": "params 10"}, "frozen")  # what is trained, without its head
    folder = round_folder(tmp_path, 3)
    assert recorded.find("sample_stage")[:5] == (policy, PROMPTS[1:4], folder, 3, start)
    assert (progress.pending.origin, progress.pending.sampled) == (end, average)
    assert recorded.find("feedback_stage")[:2] == (folder, 3)
    assert recorded.find("forget_samples")[0] == 3
    state, found, options = recorded.find("train_stage")
    assert (state, found, options["round"], options["start"]) == (before, folder, 3, 3)
    assert options["held_out"] is held_out
    assert recorded.find("save_round")[:2] == (trained, 3)
    assert recorded.find("add_staleness")[::2] == (trained, 3)
    exported, found, due, options = recorded.find("evaluate_stage")
    assert (found, due) == (folder, ("eval",))
    assert exported == ("merged", "exported 20", "frozen")
    assert options == {"round": 3, "step": 20, "origin": average}
    assert (progress.state, progress.round, progress.stage_step) == (trained, 3, 0)
    # Committed when its checkpoint is on disk, and not before.
    recorded.calls.clear()
    progress_module.commit_pending(run, progress)
    assert recorded.names == ["settle", "finish", "train", "evaluate"]
