"""The one entry point: `python -m halos_jax.main --config=configs/NAME.py --config.field=value`."""

import logging
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from absl import app, flags

from halos_jax import config as config_lib
from halos_jax.cli.command_line import refuse_arguments, take_check
from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import explain_absent, load_preset
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import MODES, TASKS, Task, load
from halos_jax.errors import UserError

_CONFIG = flags.DEFINE_string("config", None, "A preset, e.g. configs/quickstart.py.")

logger = logging.getLogger("halos_jax")


def main(overrides: list[tuple[str, str]]) -> None:
    """Check the config, then run its task; exit codes: 0 done, 1 error, 75 run me again."""
    if not _CONFIG.value:
        raise ConfigError(explain_absent())
    _start_logging()
    config = load_preset(_CONFIG.value)
    errors = apply_overrides(config, overrides)
    frozen = config_lib.freeze(config, errors=errors, checks=[_check_objective])
    _start_jax(frozen)
    if frozen.mode != "run":
        load(MODES[frozen.mode].run)(frozen)
        return
    if frozen.task == "pipeline":
        from halos_jax.tasks.preflight import check_start

        check_start(frozen, with_data=False)
    from halos_jax.sharding import wait_for_all
    from halos_jax.workdir.interrupt import catch_signals

    with catch_signals() as stop:
        metrics = run_task(frozen, stop)
    wait_for_all("end the job")  # who leaves first takes what connects the others with it
    if metrics:
        logger.info("finished: %s", ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items())))


def _check_objective(config: Config) -> list[str]:
    from halos_jax.losses import check_evaluation, check_feedback, check_loss, check_reference
    from halos_jax.rewards.parts import check_parts

    errors = check_loss(config.loss) + check_parts(config)
    task = TASKS[config.task]
    if task.samples and task.makes_feedback:
        keep_logps = config.sampling.keep_logps
        errors += check_feedback(config.loss, config.feedback.type, keep_logps=keep_logps)
    if task.has_reference:
        errors += check_reference(config.loss, config.rounds.reference, task=config.task)
    if config.task == "eval" and config.eval.on == "feedback":
        errors += check_evaluation(config.loss)
    return errors


def run_task(config: Config, stop) -> dict[str, float]:
    """Run `config.task` to its end; return its last metrics."""
    if config.task == "pipeline":
        metrics: dict[str, float] = {}
        for step in config_lib.expand_pipeline(config):
            logger.info("pipeline: %s in %s", step.task, step.workdir)
            metrics = run_task(step, stop)
        return metrics
    from halos_jax.devices import explain_memory

    # What a stage does not say by itself: models are read, or made ready, when it happens.
    with explain_memory("load", f"task {config.task}", config):
        return _find_task(config.task)(config, stop)


def _find_task(name: Task) -> Callable[..., dict[str, float]]:
    return load(TASKS[name].run)


def _start_logging() -> None:
    """Log to the console in plain lines; of the libraries only what is worth a warning."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(kind)s%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,  # absl has put its own handler there
    )
    logging.getLogger().handlers[0].addFilter(_mark_record)
    for noisy in ("absl", "orbax", "jax", "httpx", "httpx2", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.unraisablehook = _print_unraisable


def _mark_record(record: logging.LogRecord) -> bool:
    """Give a warning its name; leave out what threads of the storage library say of a failure.

    The failure itself is raised where the save is waited for.
    """
    record.kind = "warning: " if record.levelno >= logging.WARNING else ""
    text = record.getMessage()
    is_thread = "_SignalingThread.run()" in text or "in background save thread" in text
    return not (is_thread and record.exc_info)


def _print_unraisable(unraisable) -> None:
    # When a checkpoint cannot be written, the storage library's threads call an event loop that is
    # closed by then, dozens of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _start_jax(config: Config) -> None:
    """Join the other processes of the job, and keep compiled programs in the workdir."""
    import jax

    from halos_jax import devices

    if config.mesh.distributed:
        devices.join_processes()
    platform = devices.find_devices()
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)
    if platform != "cpu" and config.mode == "run":  # no other mode writes into the workdir
        # With the autotuner's choices in it: a resumed run must be the same program, bit for bit.
        cache = Path(config.workdir).absolute() / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Not its cache of kernels: with that, programs of another process have run into illegal
        # instructions (H200, jax 0.11.2).
        caches = "xla_gpu_per_fusion_autotune_cache_dir"
        jax.config.update("jax_persistent_cache_enable_xla_caches", caches)
    errors = _check_devices(config)
    if errors:
        raise ConfigError("\n".join(errors))


def _check_devices(config: Config) -> list[str]:
    from halos_jax import sharding

    if config.task == "pipeline":
        lines = []
        for stage in config_lib.expand_pipeline(config):
            found = _check_devices(stage)
            lines += [f"pipeline.overrides.{stage.task}: {line}" for line in found]
        return lines
    task = TASKS[config.task]
    if not task.on_mesh:
        return []
    sizes = {path.replace(".", "__"): attrgetter(path)(config) for path in task.divides}
    return sharding.check_divisible(sharding.make_mesh(config.mesh), **sizes)


def run() -> None:
    """Entry point of the command line: errors that a user can mend come without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Transformers, of which only tokenizers are used, misses PyTorch on every start without it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    argv, overrides = split_overrides(sys.argv)
    try:
        argv, overrides = take_check(argv, overrides)
        refuse_arguments(argv[1:], flags.FLAGS)
        app.run(lambda _: main(overrides), argv=argv)
    except KeyboardInterrupt:  # before `catch_signals` or after it
        _fail("Interrupted: stopped by Ctrl-C while there was nothing to save", 130)
    except UserError as error:
        _fail(f"{type(error).__name__}: {error}", error.exit_code)
    except MemoryError:
        advice = "take a part of the data by data.max_train, or a machine with more memory"
        _fail(f"MemoryError: this machine's own memory is used up; {advice}", 1)
    except Exception as error:
        if "jax" in sys.modules:
            from halos_jax import processes

            message = processes.explain_loss(error)
            if message:
                _fail(message, 1)
        raise


def _fail(message: str, code: int) -> None:
    """End with a message and an exit code; a job of several processes does not wait for others."""
    print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules:
        from halos_jax import processes

        if not processes.leave():
            sys.stdout.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
