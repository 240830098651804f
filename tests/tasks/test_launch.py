"""From a config to its task: checks, dispatch, pipelines."""

import threading
from types import SimpleNamespace

import jax
import pytest

from halos_jax import config as config_lib
from halos_jax import devices, main
from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    PipelineConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data.toy import run_toy_data
from halos_jax.models.files import hf
from halos_jax.tasks import launch
from halos_jax.tasks.eval import run_evaluation
from halos_jax.tasks.export import run_export
from halos_jax.tasks.label import run_labelling
from halos_jax.tasks.online import run_online
from halos_jax.tasks.sample import run_sampling
from halos_jax.tasks.train import run_training
from halos_jax.workdir.interrupt import StopSignal


@pytest.mark.parametrize(
    "task, function",
    [
        ("online", run_online),
        ("sft", run_training),
        ("reward_model", run_training),
        ("align", run_training),
        ("sample", run_sampling),
        ("label", run_labelling),
        ("eval", run_evaluation),
        ("export", run_export),
        ("toy_data", run_toy_data),
    ],
)
def test_each_task_has_its_function(task, function):
    assert launch._find_task(task) is function


def test_a_pipeline_runs_its_tasks_one_after_the_other(monkeypatch):
    ran = []

    def find(task):
        def run(config, stop):
            ran.append((task, config.task, config.workdir, config.model.path, stop))
            return {"reward_eval": float(len(ran))}

        return run

    monkeypatch.setattr(launch, "_find_task", find)
    overrides = {"online": {"model": {"path": "{workdir}/sft/final"}}}
    pipeline = PipelineConfig(tasks=("sft", "online"), overrides=overrides)
    config = Config(task="pipeline", workdir="runs/x", pipeline=pipeline)
    assert launch.run_task(config, "stop") == {"reward_eval": 2.0}
    assert ran == [
        ("sft", "sft", "runs/x/sft", "", "stop"),
        ("online", "online", "runs/x/online", "runs/x/sft/final", "stop"),
    ]


def test_sizes_are_checked_against_the_eight_devices_in_every_stage():
    good = Config(train=TrainConfig(batch_size=16), sampling=SamplingConfig(slots=8))
    assert launch._check_devices(good) == []
    bad = Config(train=TrainConfig(batch_size=12), sampling=SamplingConfig(slots=20))
    lines = launch._check_devices(bad)
    assert [line.partition(":")[0] for line in lines] == ["train.batch_size", "sampling.slots"]
    overrides = {"online": {"train": {"batch_size": 9}}}
    stages = PipelineConfig(tasks=("toy_data", "sft", "online"), overrides=overrides)
    lines = launch._check_devices(
        Config(task="pipeline", train=TrainConfig(batch_size=16), pipeline=stages)
    )
    (line,) = lines
    assert line.startswith("pipeline.overrides.online: train.batch_size: got 9")
    assert "--config.train.batch_size=16" in line


def test_a_config_of_any_form_passes_the_same_checks():
    frozen = Config(
        task="sft", model=ModelConfig(path="x"), data=DataConfig(train="y"), loss={"name": "sft"}
    )
    plain = config_lib.to_dict(frozen)
    loose = config_lib.default()
    loose.update({"task": "sft", "loss": {"name": "sft"}})
    loose.model.path, loose.data.train = "x", "y"
    assert launch.freeze_checked(frozen) == launch.freeze_checked(plain) == frozen
    assert launch.freeze_checked(loose) == frozen
    bad = Config(task="align", model=ModelConfig(path="x"), loss={"name": "dpo", "betta": 1.0})
    with pytest.raises(ConfigError) as caught:
        launch.freeze_checked(bad, errors=["first: found before"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 errors") and "first: found before" in lines[1]
    assert any("loss.betta" in line for line in lines) and any(
        "data.train" in line for line in lines
    )


def test_a_loss_that_cannot_weigh_pairs_refuses_their_weights():
    for loss, count in (("dpo", 0), ("kto", 1)):
        feedback = FeedbackConfig(margin_weights=2.0)
        with pytest.raises(ConfigError) as caught:  # for other reasons, too
            launch.freeze_checked(Config(feedback=feedback, loss={"name": loss}))
        found = [line for line in str(caught.value).splitlines() if "margin_weights" in line]
        assert len(found) == count


def test_exact_ratios_stand_in_for_kept_log_probs_and_need_a_loss_that_reads_them():
    for loss, wanted in (("dapo", ""), ("dpo", "compares the policy with none that sampled")):
        feedback = FeedbackConfig(type="scalar" if loss == "dapo" else "pairwise")
        sampling = SamplingConfig(exact_ratios=True)
        with pytest.raises(ConfigError) as caught:  # for other reasons, too
            launch.freeze_checked(Config(feedback=feedback, sampling=sampling, loss={"name": loss}))
        lines = [one for one in str(caught.value).splitlines() if "ratios" in one or "keep_" in one]
        assert len(lines) == bool(wanted) and all(wanted in one for one in lines)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_exact_ratios_by_auto_stand_in_for_kept_log_probs_where_they_are_on(temperature):
    sampling, loss = SamplingConfig(temperature=temperature, top_p=1.0), {"name": "dapo"}
    with pytest.raises(ConfigError) as caught:  # for other reasons, too
        launch.freeze_checked(
            Config(feedback=FeedbackConfig(type="scalar"), sampling=sampling, loss=loss)
        )
    lines = [one for one in str(caught.value).splitlines() if "ratios" in one or "keep_" in one]
    assert len(lines) == (temperature == 1.0)
    assert all("sampling.keep_logps: got False" in line for line in lines)


@pytest.mark.parametrize(
    ("temperature", "exact", "count"),
    [(0.7, "auto", 1), (0.7, True, 1), (1.0, "auto", 0), (0.7, False, 0)],
)
def test_a_sum_with_and_without_ratios_to_what_was_drawn_is_refused(temperature, exact, count):
    sampling = SamplingConfig(
        temperature=temperature, top_p=1.0, exact_ratios=exact, keep_logps=True
    )
    loss = {"name": "sum", "dapo": {"weight": 1.0}, "rloo": {"weight": 0.5}}
    with pytest.raises(ConfigError) as caught:  # for other reasons, too
        launch.freeze_checked(
            Config(feedback=FeedbackConfig(type="scalar"), sampling=sampling, loss=loss)
        )
    found = [one for one in str(caught.value).splitlines() if "loss: 'sum' got dapo" in one]
    assert len(found) == count


def test_a_thread_beside_the_main_one_catches_no_signals():
    found = []

    def listen():
        with launch._listen() as stop:
            found.append(stop)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert isinstance(found[0], StopSignal)


def test_no_mode_but_run_keeps_compiled_programs_in_the_workdir(monkeypatch):
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.append(name))
    monkeypatch.setattr(devices, "find_devices", lambda: "gpu")
    monkeypatch.setattr(launch, "_check_devices", lambda config: [])
    launch.start_jax(Config(mode="check"))
    assert changed == []
    launch.start_jax(Config())
    assert "jax_compilation_cache_dir" in changed


def test_a_second_run_of_a_process_has_its_own_compiled_programs(monkeypatch, tmp_path):
    """jax opens its cache once; a resume of the second run would else not find what it was."""
    before = {name: getattr(jax.config, name) for name in launch._CACHE_SETTINGS}
    monkeypatch.setattr(devices, "find_devices", lambda: "gpu")
    monkeypatch.setattr(launch, "_check_devices", lambda config: [])
    used = []

    def run(config, stop):
        used.append(jax.config.jax_compilation_cache_dir)
        jax.jit(lambda x: x * 3 + len(used))(1.0).block_until_ready()
        if len(used) == 2:
            raise ConfigError("no")
        return {}

    monkeypatch.setattr(launch, "run_task", run)
    launch.launch(Config(workdir=str(tmp_path / "first")))
    with pytest.raises(ConfigError, match="no"):
        launch.launch(Config(workdir=str(tmp_path / "second")))
    assert used == [str(tmp_path / name / "compilation_cache") for name in ("first", "second")]
    assert {name: getattr(jax.config, name) for name in before} == before  # the caller's again
    kept = [
        list((tmp_path / name / "compilation_cache").glob("jit*")) for name in ("first", "second")
    ]
    assert all(kept)


def test_a_mode_is_done_in_place_of_the_task_and_of_every_stage_of_a_pipeline(monkeypatch):
    done = []
    monkeypatch.setattr(launch, "start_jax", lambda config: None)
    monkeypatch.setattr(main, "start_logging", lambda: None)  # it would stay for the tests after
    monkeypatch.setattr(main, "load_preset", lambda name: config_lib.default())
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value="preset.py"))
    monkeypatch.setattr(launch, "run_task", lambda *_: pytest.fail("a mode has run the task"))
    monkeypatch.setattr(
        launch, "load", lambda name: lambda config: done.append((name, config.task))
    )
    bench, pipeline = [("mode", "check"), ("task", "bench")], ("task", "pipeline")
    main.main(bench)
    main.main([("mode", "check"), pipeline, ("pipeline.tasks", "('bench',)")])
    check = "halos_jax.tasks.preflight:run_check"
    assert done == [(check, "bench"), (check, "pipeline")]


def test_what_is_logged_once_is_logged_once_in_each_run_of_a_process(monkeypatch, caplog):
    def run(config, stop):
        for _ in range(2):
            hf._warn_once("x is not read")
        return {}

    monkeypatch.setattr(launch, "run_task", run)
    monkeypatch.setattr(launch, "_check_devices", lambda config: [])
    for count in (1, 2):
        launch.launch(Config())
        assert caplog.text.count("x is not read") == count


def test_the_last_line_has_the_time_and_what_the_run_is_for():
    metrics = {f"feedback_{number}": 1.5 for number in range(40)}
    metrics |= {"reward_eval/high": 0.5, "reward_eval/low": 0.25, "reward_eval": 1 / 3}
    line = launch.describe_end(metrics, 80.2)
    assert line.startswith(
        "finished in 1 min 20 s; at the end: reward_eval 0.3333 (0.25 to 0.5), feedback_0 1.5, "
    )
    assert line.endswith(" more") and len(line) <= 100
    line = launch.describe_end({"counters/lr": 1e-5, "loss/train": 0.5, "loss/eval": 0.25}, 2)
    assert line == "finished in 2 s; at the end: loss/eval 0.25, loss/train 0.5, counters/lr 1e-05"
