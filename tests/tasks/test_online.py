"""What the online loop does around its stages; whole runs are in tests/e2e."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from halos_jax import storage
from halos_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data import datasets
from halos_jax.devices import DeviceError
from halos_jax.models.hf.families import ModelError
from halos_jax.rounds import progress as progress_module
from halos_jax.rounds import setup
from halos_jax.rounds.proof.origin import UNKNOWN, OriginError
from halos_jax.storage import WorkdirError
from halos_jax.tasks import online as loop
from halos_jax.workdir import manifests, runs, timing
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import make_run


def make_config(toy, workdir, **changes) -> Config:
    config = Config(
        workdir=str(workdir),
        progress=False,
        model=ModelConfig(path=str(toy / "policy"), compute_dtype="float32", remat="none"),
        reward=RewardConfig(kind="function", function="halos_jax.data.toy:score_by_rule"),
        data=DataConfig(train=str(toy / "prompts.jsonl")),
        rounds=RoundsConfig(total_prompts=4, prompts_per_round=2),
        sampling=SamplingConfig(
            num_samples_per_prompt=2, max_prompt_length=10, max_tokens=3, slots=8, chunk=3
        ),
        train=TrainConfig(batch_size=8, max_length=16, row_multiple=64),
    )
    return dataclasses.replace(config, **changes)


def commit_all(folder, manifest, ledger) -> None:
    folder.mkdir(parents=True)
    (folder / "eval.jsonl").write_text("{}\n")
    for stage in manifests.stages_of(manifest.round):
        files = {"eval.jsonl": 1} if stage == "evaluate" else {}
        manifest = manifests.commit_stage(folder, manifest, stage, files=files, ledger=ledger)


def test_a_complete_run_has_nothing_to_do(toy, tmp_path, caplog):
    caplog.set_level("INFO")
    config = make_config(toy, tmp_path)
    info = runs.join_run(config)
    commit_all(round_folder(tmp_path, 0), Manifest(round=0), info.ledger)
    last = Manifest(round=1, metrics={"reward_eval": 0.5})
    commit_all(round_folder(tmp_path, 1), last, info.ledger)
    (tmp_path / "final").mkdir()
    info.ledger.note_tree(tmp_path / "final", tmp_path / "final")
    info.close()
    assert loop.run_online(config, StopSignal()) == {"reward_eval": 0.5}
    assert "nothing to do" in caplog.text
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=7))
    caplog.clear()
    assert loop.run_online(longer, StopSignal()) == {"reward_eval": 0.5}
    assert "-> 7; this is for rounds not trained yet, but there are none left" in caplog.text
    assert "nothing to do" in caplog.text
    # A loop that changes nothing still holds the lock while it looks, and lets it go.
    runs.join_run(config).close()
    # What is complete is looked at all the same.
    (round_folder(tmp_path, 0) / "eval.jsonl").write_text("{ }\n")
    with pytest.raises(manifests.ManifestError, match=r"rounds/0000.*eval.jsonl has sha256"):
        loop.run_online(config, StopSignal())


def test_a_changed_config_is_refused_and_the_lock_released(toy, tmp_path):
    runs.join_run(make_config(toy, tmp_path)).close()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        loop.run_online(make_config(toy, tmp_path, seed=1), StopSignal())
    runs.join_run(make_config(toy, tmp_path)).close()


def test_held_out_prompts_that_are_trained_on_are_refused(toy, tmp_path):
    data = DataConfig(train=str(toy / "prompts.jsonl"), eval=str(toy / "prompts.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.eval: 12 of its prompts are in data\.train"):
        loop.run_online(make_config(toy, tmp_path, data=data), StopSignal())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"train\.max_length: got 16, allowed: 12 at most"),
        (
            {"train": TrainConfig(max_length=12)},
            r"sampling\.max_prompt_length \+ sampling\.max_tokens: got 13, allowed: 12 at most",
        ),
    ],
)
def test_sequences_beyond_the_models_angles_are_refused(toy, tmp_path, short, changes, message):
    config = make_config(toy, tmp_path / "run", model=short, **changes)
    with pytest.raises(ModelError, match=message):
        loop.run_online(config, StopSignal())


def test_a_stop_between_stages_carries_on_in_the_same_place(toy, tmp_path):
    """SIGTERM before the first shard, then a run to the end: the same files as without it."""
    stop = StopSignal()
    stop.handle()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes((toy / "prompts.jsonl").read_bytes())
    config = make_config(toy, tmp_path / "run", data=DataConfig(train=str(prompts)))
    with pytest.raises(Interrupted):
        loop.run_online(config, stop)
    assert not list((tmp_path / "run" / "rounds" / "0001").iterdir())
    # What it was started with is looked at before it goes on.
    prompts.write_bytes((toy / "eval.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"data\.train: .*prompts.jsonl holds something else"):
        loop.run_online(config, StopSignal())
    prompts.write_bytes((toy / "prompts.jsonl").read_bytes())
    metrics = loop.run_online(config, StopSignal())
    assert metrics["samples"] == 4
    order = datasets.order_prompts(datasets.load_prompts(config.data.train), config.seed)
    for round, chosen in ((1, order[:2]), (2, order[2:4])):
        folder = round_folder(tmp_path / "run", round)
        ids = [json.loads(line)["prompt_id"] for line in (folder / "samples.jsonl").open()]
        assert ids == [prompt.prompt_id for prompt in chosen for _ in range(2)]
        manifest = manifests.load_manifest(folder)
        assert manifest.next_stage is None
        assert manifest.prompts == datasets.identify_prompts(chosen)
        assert manifest.policy == ("sft" if round == 1 else "round-0001")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_rounds_of_any_size_use_the_budget_and_keep_what_was_decided(toy, tmp_path, monkeypatch):
    """Rounds of 1, 2 and 1 of 4 prompts; stopped in the second, which is not decided again."""
    config = make_config(toy, tmp_path / "run")
    sizes, stop, seen = {1: 1, 2: 2, 3: 3}, StopSignal(), {}

    def choose(config, budget, done, available):
        seen[len(done)] = {name: done[-1].metrics[name] for name in done[-1].metrics}
        if len(done) == 2:  # rounds 0 and 1
            stop.handle()
        return sizes[len(done)], {"auto": {"prompts": sizes[len(done)]}}

    monkeypatch.setattr(progress_module, "choose_prompts_per_round", choose)
    with pytest.raises(Interrupted):
        loop.run_online(config, stop)
    assert manifests.load_manifest(round_folder(tmp_path / "run", 2)).stages == ()
    sizes[2] = 1
    loop.run_online(config, StopSignal())
    found = [manifests.load_manifest(round_folder(tmp_path / "run", n)) for n in (1, 2, 3)]
    assert [(one.start, one.stop) for one in found] == [(0, 1), (1, 3), (3, 4)]
    assert [one.decisions["auto"]["prompts"] for one in found] == [1, 2, 3]
    assert [one.metrics["samples"] for one in found] == [2, 4, 2]
    # What is decided on is what the manifest then says, though the round was not committed yet.
    assert seen[2] == found[0].metrics and seen[3] == found[1].metrics
    assert {"kl_sampled", "stale_ess", "steps_done"} <= seen[2].keys()


def test_each_round_leaves_its_policy_where_that_is_asked_for(toy, tmp_path, monkeypatch, caplog):
    """Killed while the model of round 1 is written, the run writes it again before round 2.

    And with its export and its newest checkpoint damaged, it trains round 2 once more.
    """
    config = make_config(
        toy,
        tmp_path / "run",
        rounds=RoundsConfig(total_prompts=4, prompts_per_round=2, export_each=True),
        feedback=FeedbackConfig(type="binary", threshold=0.0),
        checkpoint=CheckpointConfig(keep=2),
        loss={"name": "kto"},
    )
    killed = dataclasses.replace(config, workdir=str(tmp_path / "killed"))

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.final.export, "write_model", die)
    with pytest.raises(KeyboardInterrupt):
        loop.run_online(killed, StopSignal())
    assert manifests.load_manifest(round_folder(tmp_path / "killed", 1)).next_stage is None
    assert not (round_folder(tmp_path / "killed", 1) / "model").exists()
    monkeypatch.undo()
    weights = {}
    for found in (config, killed):
        loop.run_online(found, StopSignal())
        folders = [round_folder(found.workdir, round) / "model" for round in (1, 2)]
        for folder in (*folders, Path(found.workdir) / "final"):
            weights[found.workdir, folder.parent.name] = (folder / "model.safetensors").read_bytes()
    (one, two, last), again = list(weights.values())[:3], list(weights.values())[3:]
    assert [one, two, last] == again
    assert one != two and two == last
    assert not (round_folder(tmp_path / "run", 0) / "model").exists()

    before = {path: path.read_bytes() for path in (tmp_path / "run" / "rounds").rglob("*.json*")}
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    chunks = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(chunks.read_bytes())
    for place in range(32, len(data), 64):  # in every array: their order differs from save to save
        data[place] ^= 1
    chunks.write_bytes(data)
    (tmp_path / "run" / "final" / "model.safetensors").unlink()
    loop.run_online(config, StopSignal())
    assert "00000002 is incomplete or corrupt" in caplog.text
    assert "the training of round 2 is lost" in caplog.text
    folders = [round_folder(tmp_path / "run", 2) / "model", tmp_path / "run" / "final"]
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == [last, last]
    assert {path: path.read_bytes() for path in before} == before


def test_a_policy_that_is_trained_again_forgets_what_it_has_sampled(tmp_path, monkeypatch):
    """And when its save begins, nothing is missing that only this process knows."""
    called, ledger = [], open_ledger(tmp_path)
    folder = round_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    manifest = Manifest(round=1)
    for stage in ("sample", "score", "feedback"):
        manifest = manifests.commit_stage(folder, manifest, stage, ledger=ledger)

    def note(name, result=None):
        def call(run, *arguments, **_):
            times = [one["stage"] for one in timing.read_times(tmp_path)]
            called.append((name, times))
            return result

        return call

    trained = SimpleNamespace(step=6)
    for name in ("forget_samples", "save_round"):
        monkeypatch.setattr(loop.stages, name, note(name))
    monkeypatch.setattr(loop.stages, "train_stage", note("train_stage", trained))
    monkeypatch.setattr(loop, "identify_end", lambda *given: (UNKNOWN, UNKNOWN))
    run = make_run(
        workdir=tmp_path,
        ledger=ledger,
        prompts=[],
        held_out=[],
        config=Config(rounds=RoundsConfig(watch_samples=0)),
        trainer=SimpleNamespace(),
        checkpoints=SimpleNamespace(finish=lambda: called.append(("finish", []))),
    )
    state = SimpleNamespace(step=0, params=None)
    progress = loop.Progress(state, round=0)
    loop.run_round(run, progress, manifest, None)
    assert called == [("forget_samples", []), ("train_stage", []), ("save_round", ["train"])]
    assert progress.pending.evaluation.metrics == {"steps_done": 6}
    assert (progress.state, progress.round) == (trained, 1)
    # What is trained, and whose checkpoint is on disk, is neither forgotten nor trained again.
    called.clear()
    loop.run_round(run, progress, manifest, None)
    assert called == []
    committed = loop.commit_pending(run, progress)
    assert committed.next_stage is None and called == [("finish", [])]
    assert progress.pending is None and loop.commit_pending(run, progress) is None
    manifest_path = folder / "manifest.json"
    assert ledger.find(manifest_path)["sha256"] == storage.hash_file(manifest_path)


def test_memory_that_ends_in_training_names_the_round_and_the_same_command_goes_on(
    toy, tmp_path, monkeypatch, caplog
):
    config = make_config(toy, tmp_path / "run", optimizer=OptimizerConfig(learning_rate=5e-8))

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(loop.stages, "train_stage", fail)
    with pytest.raises(DeviceError, match=r"in training of round 1 .*; lower train\.tokens_per_"):
        loop.run_online(config, StopSignal())
    assert "optimizer.learning_rate=5e-08 is low for loss 'dpo' on all weights" in caplog.text
    monkeypatch.undo()
    train = dataclasses.replace(config.train, tokens_per_device=64)
    loop.run_online(dataclasses.replace(config, train=train), StopSignal())
    assert manifests.load_manifest(round_folder(tmp_path / "run", 2)).next_stage is None


def test_every_round_says_what_drew_its_samples_and_a_sampler_with_others_is_refused(
    toy, tmp_path, monkeypatch
):
    """The layer that the sampler has wrong is 1 % off, in one round."""
    data = DataConfig(train=str(toy / "prompts.jsonl"), eval=str(toy / "eval.jsonl"), max_eval=2)
    kto = {"feedback": FeedbackConfig(type="binary", threshold=0.0), "loss": {"name": "kto"}}
    config = make_config(toy, tmp_path / "run", data=data, **kto)
    make_sampler, calls = setup.make_sampler, []

    def make_wrong(*given):
        sampler = make_sampler(*given)

        def unstack(params):
            calls.append(len(calls))
            weights = sampler.unstack(params)
            if len(calls) == 4:  # round 2: after the evaluation of round 0, round 1 and its own
                first, *rest = weights["layers"]
                first = {**first, "down": first["down"] * 1.01}
                weights = {**weights, "layers": (first, *rest)}
            return weights

        return dataclasses.replace(sampler, unstack=unstack)

    monkeypatch.setattr(setup, "make_sampler", make_wrong)
    with pytest.raises(OriginError, match=r"samples, round 2: .*layers\.down \(layers 0\);"):
        loop.run_online(config, StopSignal())
    monkeypatch.undo()
    loop.run_online(config, StopSignal())  # nothing is lost: it goes on
    zero, one, two = (manifests.load_manifest(round_folder(config.workdir, n)) for n in range(3))
    assert zero.sampled_by == {"eval.jsonl": zero.trained}
    assert one.sampled_by == {"samples.jsonl": zero.trained, "eval.jsonl": one.trained}
    assert two.sampled_by == {"samples.jsonl": one.trained, "eval.jsonl": two.trained}
    assert len({zero.trained, one.trained, two.trained}) == 3
    # Another policy in memory than the round before has left is refused before it samples.
    folder = round_folder(config.workdir, 2)
    changed = dataclasses.replace(two, trained="0" * 32)
    ledger = open_ledger(config.workdir)
    manifests.save_manifest(folder, changed, ledger)
    longer = dataclasses.replace(config.rounds, total_prompts=6)
    with pytest.raises(OriginError, match=r"round 3: .* but round 2 ended with 000000000000"):
        loop.run_online(dataclasses.replace(config, rounds=longer), StopSignal())


def test_a_sampler_that_is_off_is_noticed_by_what_the_trainer_makes_of_its_samples(
    toy, tmp_path, monkeypatch
):
    """One layer is 1 % off, and nothing else looks at the sampler's weights."""
    config = make_config(toy, tmp_path / "run")
    make_sampler = setup.make_sampler

    def make_wrong(*given):
        sampler = make_sampler(*given)

        def unstack(params):
            weights = sampler.unstack(params)
            first, *rest = weights["layers"]
            return {**weights, "layers": ({**first, "down": first["down"] * 1.01}, *rest)}

        return dataclasses.replace(sampler, unstack=unstack)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_sampler", make_wrong)
        patch.setattr(loop.stages.origins, "check_weights", lambda *given: None)
        with pytest.raises(OriginError, match=r"round 1: .*differ by .* nats a token on average"):
            loop.run_online(config, StopSignal())
    folder = round_folder(config.workdir, 1)
    assert manifests.load_manifest(folder) is None
    wrong = [json.loads(line) for line in (folder / "rescored.jsonl").open()]
    assert (folder / "samples.shard-0000.jsonl").exists()
    # The samples are kept: bounds that allow what was found let the run go on with them.
    wide = dataclasses.replace(config.rounds, rescore_mean=1.0, rescore_max=9.0)
    loop.run_online(dataclasses.replace(config, rounds=wide), StopSignal())
    manifest = manifests.load_manifest(folder)
    assert manifest.files["rescored.jsonl"].count == len(wrong) == 4
    assert [json.loads(line) for line in (folder / "rescored.jsonl").open()] == wrong
    assert manifest.metrics["rescore_tokens"] == sum(len(one["sampled"]) for one in wrong)


def test_re_scoring_leaves_the_samples_as_they_are(toy, tmp_path):
    found = {}
    for count in (0, 8):
        rounds = RoundsConfig(total_prompts=4, prompts_per_round=2, rescore_samples=count)
        config = make_config(toy, tmp_path / str(count), rounds=rounds)
        loop.run_online(config, StopSignal())
        folder = round_folder(config.workdir, 2)
        found[count] = (folder / "samples.jsonl").read_bytes()
        metrics = manifests.load_manifest(folder).metrics
        assert ("rescore_max" in metrics) == bool(count)
        lines = [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").open()]
        assert sum("rescore_mean" in line for line in lines) == (2 if count else 0)
    assert found[0] == found[8] and 0 <= metrics["rescore_mean"] < 2e-6
    assert metrics["rescore_max"] < 2e-5
