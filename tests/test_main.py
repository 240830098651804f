"""The entry point: what a command line becomes, which task runs, how it ends."""

import logging
import sys
from types import SimpleNamespace

import jax
import pytest
from absl import app

from halos_jax import config as config_lib
from halos_jax import devices, main
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.config import (
    Config,
    ConfigError,
    PipelineConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data.records.fields import RecordError
from halos_jax.data.toy import run_toy_data
from halos_jax.metrics import MetricsError, NonFiniteError
from halos_jax.models.hf.families import ModelError
from halos_jax.rewards.scorers import RewardError
from halos_jax.storage import WorkdirError
from halos_jax.tasks.eval import run_evaluation
from halos_jax.tasks.export import run_export
from halos_jax.tasks.label import run_labelling
from halos_jax.tasks.online import run_online
from halos_jax.tasks.sample import run_sampling
from halos_jax.tasks.train import run_training
from halos_jax.workdir.interrupt import Interrupted
from halos_jax.workdir.state import ManifestError

EXPLAINED = [
    CheckpointError,
    ConfigError,
    ManifestError,
    MetricsError,
    ModelError,
    NonFiniteError,
    RecordError,
    RewardError,
    WorkdirError,
]


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
    assert main._find_task(task) is function


def test_a_pipeline_runs_its_tasks_one_after_the_other(monkeypatch):
    ran = []

    def find(task):
        def run(config, stop):
            ran.append((task, config.task, config.workdir, config.model.path, stop))
            return {"reward_eval": float(len(ran))}

        return run

    monkeypatch.setattr(main, "_find_task", find)
    overrides = {"online": {"model": {"path": "{workdir}/sft/final"}}}
    pipeline = PipelineConfig(tasks=("sft", "online"), overrides=overrides)
    config = Config(task="pipeline", workdir="runs/x", pipeline=pipeline)
    assert main.run_task(config, "stop") == {"reward_eval": 2.0}
    assert ran == [
        ("sft", "sft", "runs/x/sft", "", "stop"),
        ("online", "online", "runs/x/online", "runs/x/sft/final", "stop"),
    ]


def test_overrides_are_taken_from_the_command_line_and_parsed_by_the_schema():
    arguments = [
        "main",
        "--config=configs/quickstart.py",
        "--config.train.batch_size=7",
        "--config.workdir",
        "runs/a",
        "--config.optimizer.learning_rate=1e-4",
        "--other=1",
    ]
    rest, overrides = split_overrides(arguments)
    assert rest == ["main", "--config=configs/quickstart.py", "--other=1"]
    config = config_lib.default()
    assert apply_overrides(config, overrides) == []
    assert (config.train.batch_size, config.workdir) == (7, "runs/a")
    assert config.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("kind", EXPLAINED, ids=lambda kind: kind.__name__)
def test_an_error_that_explains_itself_is_one_line_and_exit_code_1(monkeypatch, capsys, kind):
    def fail(*_, **__):
        raise kind("what, got, allowed")

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"{kind.__name__}: what, got, allowed\n"


def test_a_stop_has_an_exit_code_of_its_own_and_a_fault_its_traceback(monkeypatch, capsys):
    errors = [Interrupted("run me again"), ValueError("ours")]

    def fail(*_, **__):
        raise errors.pop(0)

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 75 and "run me again" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ours"):
        main.run()


def test_what_is_no_flag_is_refused_and_a_preset_is_needed(monkeypatch, capsys):
    for given, expected in (
        ("configs/quickstart.py", "allowed: --config=configs/quickstart.py"),
        ("--lr=1e-5", "fields are set as --config.optimizer.learning_rate=1e-5"),
    ):
        monkeypatch.setattr(sys, "argv", ["main", given])
        with pytest.raises(SystemExit) as caught:
            main.run()
        assert caught.value.code == 1 and expected in capsys.readouterr().err
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value=None))
    with pytest.raises(ConfigError, match=r"--config: got nothing, .* online_dpo, .*quickstart"):
        main.main([])


def test_the_end_of_the_machines_memory_is_one_message(monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert caught.value.code == 1
    assert "this machine's own memory is used up; take a part" in capsys.readouterr().err


def test_sizes_are_checked_against_the_eight_devices_in_every_stage():
    good = Config(train=TrainConfig(batch_size=16), sampling=SamplingConfig(slots=8))
    assert main._check_devices(good) == []
    bad = Config(train=TrainConfig(batch_size=12), sampling=SamplingConfig(slots=20))
    lines = main._check_devices(bad)
    assert [line.partition(":")[0] for line in lines] == ["train.batch_size", "sampling.slots"]
    overrides = {"online": {"train": {"batch_size": 9}}}
    stages = PipelineConfig(tasks=("toy_data", "sft", "online"), overrides=overrides)
    lines = main._check_devices(
        Config(task="pipeline", train=TrainConfig(batch_size=16), pipeline=stages)
    )
    (line,) = lines
    assert line.startswith("pipeline.overrides.online: train.batch_size: got 9")
    assert "--config.train.batch_size=16" in line


def test_the_noise_of_a_failed_checkpoint_is_left_out(monkeypatch):
    """It was seen on a full disk; what else cannot be raised is still printed."""
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    noise = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("something else"))
    main._print_unraisable(noise)
    main._print_unraisable(other)
    assert printed == [other]


def test_what_a_storage_thread_says_of_a_failure_is_left_out_and_warnings_are_named():
    def make(text, level=logging.INFO, **options):
        options = {"exc_info": None} | options
        return logging.LogRecord("absl", level, "f.py", 1, text, (), options["exc_info"])

    trace = (ValueError, ValueError("x"), None)
    plain, warning = make("round 1"), make("odd", logging.WARNING)
    assert main._mark_record(plain) and plain.kind == ""
    assert main._mark_record(warning) and warning.kind == "warning: "
    for text in (
        "[thread=x] _SignalingThread.run() raised an exception: full",
        "Failed to run 4 Handler Commit operations in background save thread, directory: x",
    ):
        assert not main._mark_record(make(text, logging.ERROR, exc_info=trace))
        assert main._mark_record(make(text, logging.ERROR))
    assert main._mark_record(make("other", logging.ERROR, exc_info=trace))


def test_logs_are_plain_lines_on_the_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        main._start_logging()
        logging.getLogger("halos_jax").info("round 1 of 4 done")
        logging.getLogger("halos_jax").warning("all samples were cut")
        logging.getLogger("orbax").info("noise")
        written = capsys.readouterr()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    first, second = written.out.splitlines()[-2:]
    assert written.err == "" and first.endswith(" round 1 of 4 done")
    assert second[8:] == " warning: all samples were cut"
    assert "noise" not in written.out


def test_no_mode_but_run_keeps_compiled_programs_in_the_workdir(monkeypatch):
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.append(name))
    monkeypatch.setattr(devices, "find_devices", lambda: "gpu")
    monkeypatch.setattr(main, "_check_devices", lambda config: [])
    main._start_jax(Config(mode="check"))
    assert changed == []
    main._start_jax(Config())
    assert "jax_compilation_cache_dir" in changed


def test_a_mode_is_done_in_place_of_the_task_and_of_every_stage_of_a_pipeline(monkeypatch):
    done = []
    monkeypatch.setattr(main, "_start_jax", lambda config: None)
    monkeypatch.setattr(main, "load_preset", lambda name: config_lib.default())
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value="preset.py"))
    monkeypatch.setattr(main, "run_task", lambda *_: pytest.fail("a mode has run the task"))
    monkeypatch.setattr(main, "load", lambda name: lambda config: done.append((name, config.task)))
    bench, pipeline = [("mode", "check"), ("task", "bench")], ("task", "pipeline")
    main.main(bench)
    main.main([("mode", "check"), pipeline, ("pipeline.tasks", "('bench',)")])
    check = "halos_jax.tasks.preflight:run_check"
    assert done == [(check, "bench"), (check, "pipeline")]
