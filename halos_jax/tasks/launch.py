"""From a config to its task: the checks, jax and its devices, the stages of a pipeline."""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from halos_jax import config as config_lib
from halos_jax import devices, sharding
from halos_jax.config import Config, ConfigError
from halos_jax.config.tasks import MODES, TASKS, Task, load
from halos_jax.console.compiling import forget_compilations, watch_compilations
from halos_jax.console.logs import hush
from halos_jax.console.stages import show_seconds
from halos_jax.console.summary import format_facts
from halos_jax.console.values import find_text_width, fit, show_metrics
from halos_jax.console.watchdog import watch
from halos_jax.devices import explain_memory
from halos_jax.losses import (
    check_evaluation,
    check_exact,
    check_feedback,
    check_loss,
    check_mixture,
    check_reference,
    settle_sampling,
)
from halos_jax.losses.requirements import check_given_reference, check_teacher
from halos_jax.once import forget_run
from halos_jax.policies import branch, hub
from halos_jax.tasks.job import read_by_others
from halos_jax.tasks.overview import describe_machine, describe_task
from halos_jax.trackers.registry import find_problems as find_tracker_problems
from halos_jax.workdir.interrupt import StopSignal, catch_signals

logger = logging.getLogger("halos_jax")

# Metrics in the order in which the last line has them; "" stands for all others.
_FIRST = ("reward_eval", "reward_test", "loss/eval", "rewards_eval/accuracies", "loss/train", "")

_CACHE = "compilation_cache"  # in the workdir
_KNOWN = "compilation_cache.known"  # beside a copy of it: the names of what was copied
_SUFFIX = "-cache"  # of jax's files: jit_step-HASH-cache
# XLA's kernel cache stays off: with it, programs compiled by another process have failed with
# illegal instructions (H200, jax 0.11.2).
_XLA_CACHES = "xla_gpu_per_fusion_autotune_cache_dir"
_CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


def freeze_checked(config: config_lib.Settings | Config, errors: Iterable[str] = ()) -> Config:
    """Return the frozen config, with every check that needs no data and no device.

    Args:
      errors: further error lines, to be raised together with the errors found here.

    Raises:
      ConfigError: with one line per error.
    """
    plain = config_lib.to_dict(config) if isinstance(config, Config) else config
    checks = [_check_objective, find_tracker_problems, branch.find_problems, hub.find_problems]
    return config_lib.freeze(plain, errors=errors, checks=checks)


def launch(config: Config) -> dict[str, float]:
    """Run a frozen config, or only check it, as its mode says; return its task's last metrics.

    Raises:
      UserError: for anything that the user can fix; its subclass `Interrupted` after SIGTERM or
        Ctrl-C.
    """
    forget_run()
    with _restore_cache():
        try:
            return _launch(config)
        finally:
            forget_compilations()


def _launch(config: Config) -> dict[str, float]:
    start_jax(config)
    watch_compilations()
    if config.mode != "run":
        load(MODES[config.mode].run)(config)
        return {}
    if config.task == "pipeline":
        from halos_jax.tasks.preflight import check_start  # imports all other tasks too

        check_start(config, with_data=False)
    began = time.monotonic()
    logger.info("%s", format_facts("this machine", describe_machine()))
    with _listen() as stop, watch(config.hang_minutes):
        metrics = run_task(config, stop)
    sharding.wait_for_all("end the job")  # the first to leave would disconnect the others
    if metrics:
        logger.info("%s", describe_end(metrics, time.monotonic() - began))
    return metrics


def describe_end(metrics: Mapping[str, float], seconds: float) -> str:
    """Return a line that says how long a task has taken, and the first of its metrics."""
    took = f"finished in {show_seconds(seconds)}; at the end: "
    shown = show_metrics(dict(sorted(metrics.items(), key=_rank)))
    return took + fit(shown, width=find_text_width() - len(took))


def _rank(item: tuple[str, float]) -> tuple[int, str]:
    """Put what a run is for before what says how it went, and intervals behind their means."""
    stem = item[0].removesuffix("/low").removesuffix("/high")
    order = [number for number, name in enumerate(_FIRST) if stem == name or not name]
    return order[0], stem


@contextlib.contextmanager
def _restore_cache() -> Iterator[None]:
    """Give back jax's cache of compiled programs: behind a run it is the caller's own again."""
    before = {name: getattr(jax.config, name) for name in _CACHE_SETTINGS}
    try:
        yield
    finally:
        changed = [name for name in before if getattr(jax.config, name) != before[name]]
        for name in changed:
            jax.config.update(name, before[name])
        if changed:
            compilation_cache.reset_cache()


@contextlib.contextmanager
def _listen() -> Iterator[StopSignal]:
    """Catch the signals to stop; outside a program's main thread Python does not allow it."""
    if threading.current_thread() is threading.main_thread():
        with catch_signals() as stop:
            yield stop
    else:
        yield StopSignal()


def run_task(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run `config.task` to its end; return its last metrics."""
    if config.task == "pipeline":
        metrics: dict[str, float] = {}
        steps = config_lib.expand_pipeline(config)
        with read_by_others([step.task for step in steps]):
            for step in steps:
                metrics = run_task(step, stop)
        return metrics
    if jax.process_index() == 0:
        logger.info("%s", describe_task(config))
        hub.warn_of_no_token(config.export)
    # For memory errors that no stage explains itself: they come up while models are loaded.
    with explain_memory("load", f"task {config.task}", config):
        return _find_task(config.task)(config, stop)


def _find_task(name: Task) -> Callable[[Config, StopSignal], dict[str, float]]:
    return load(TASKS[name].run)


def _check_objective(config: Config) -> list[str]:
    errors = check_loss(config.loss)
    task = TASKS[config.task]
    if task.samples and task.makes_feedback:
        errors += check_feedback(
            config.loss,
            config.feedback.type,
            keep_logps=config.sampling.keep_logps or bool(settle_sampling(config).exact_ratios),
            weights=bool(config.feedback.margin_weights),
        )
        if config.sampling.exact_ratios is True and not errors:
            errors += check_exact(config.loss, config.feedback.type)
        elif settle_sampling(config).exact_ratios and not errors:
            errors += check_mixture(config.loss)
    if task.has_reference:
        errors += check_reference(config.loss, config.rounds.reference, task=config.task)
    by_feedback = config.task == "eval" and config.eval.on == "feedback"
    if by_feedback:
        errors += check_evaluation(config.loss)
    if config.task != "pipeline":
        errors += check_given_reference(config, task=config.task)
        errors += check_teacher(
            config.loss,
            config.model.teacher,
            task=config.task,
            has_loss=task.has_reference or by_feedback,
        )
    return errors


def start_jax(config: Config) -> None:
    """Connect to the other processes of the job, and cache compiled programs in the workdir."""
    if config.mesh.distributed:
        devices.join_processes()
    platform = devices.find_devices()
    if jax.process_index():
        hush()
    if platform != "cpu" and config.mode == "run":  # no other mode writes into the workdir
        _use_cache(Path(config.workdir).absolute() / _CACHE)
    errors = _check_devices(config) if MODES[config.mode].on_devices else []
    if errors:
        raise ConfigError("\n".join(errors))


def _use_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`.

    It includes the autotuner's choices, so that a resumed run executes the very same program and
    stays the same bit for bit.
    """
    compilation_cache.reset_cache()  # jax stays with that of a run before in this process
    for name, value in zip(_CACHE_SETTINGS, (str(folder), 0.0, _XLA_CACHES), strict=True):
        jax.config.update(name, value)


def use_copied_cache(workdir: Path, scratch: Path) -> None:
    """Compile with the programs and choices that the run in `workdir` has, as in a resume of it.

    What is compiled now goes into `scratch`, and `list_compiled` tells it from what was copied.
    Without such programs nothing changes. jax 0.10 does not find them: in its names of programs is
    the folder with XLA's choices.
    """
    if (workdir / _CACHE).is_dir():
        shutil.copytree(workdir / _CACHE, scratch / _CACHE)
        _note_known(scratch, _list_programs(scratch / _CACHE))
        _use_cache(scratch / _CACHE)


def list_compiled() -> list[str] | None:
    """Return the names of the programs that were compiled since `use_copied_cache`, in order.

    They are those that the run does not have, such as "jit_decode_chunk". Only process 0 knows
    them. None: no cache of a run is in use.
    """
    folder = _find_copied()
    if folder is None:
        return None
    known = (folder / _KNOWN).read_text("utf-8").split()
    new = sorted(_list_programs(folder / _CACHE) - {*known})
    return [name.removesuffix(_SUFFIX).rpartition("-")[0] for name in new]


@contextlib.contextmanager
def compile_aside() -> Iterator[None]:
    """Leave what is compiled inside out of `list_compiled`: it is no part of what a run does."""
    folder = _find_copied()
    before = _list_programs(folder / _CACHE) if folder is not None else set()
    try:
        yield
    finally:
        if folder is not None:
            known = {*(folder / _KNOWN).read_text("utf-8").split()}
            _note_known(folder, known | (_list_programs(folder / _CACHE) - before))


def _find_copied() -> Path | None:
    """Return the folder with the copied cache that is in use, if one is."""
    folder = Path(getattr(jax.config, _CACHE_SETTINGS[0]) or _CACHE).parent
    return folder if (folder / _KNOWN).is_file() else None


def _list_programs(folder: Path) -> set[str]:
    """Return the names of jax's files, each of which is a compiled program."""
    return {path.name for path in folder.iterdir() if path.name.endswith(_SUFFIX)}


def _note_known(folder: Path, names: Iterable[str]) -> None:
    (folder / _KNOWN).write_text("\n".join(sorted(names)), "utf-8")


def _check_devices(config: Config) -> list[str]:
    if config.task == "pipeline":
        lines: list[str] = []
        for stage in config_lib.expand_pipeline(config):
            found = _check_devices(stage)
            lines += [f"pipeline.overrides.{stage.task}: {line}" for line in found]
        return lines
    task = TASKS[config.task]
    if not task.on_mesh:
        return []
    sizes = {path.replace(".", "__"): attrgetter(path)(config) for path in task.divides}
    return sharding.check_divisible(sharding.make_mesh(config.mesh), **sizes)
