"""Runs the program in forked children that end themselves, or fail, at a chosen point.

Importing everything takes longer than a tiny run, so one process imports it once and forks. It must
not start jax's backend itself: threads do not survive a fork. A child reports every durable
operation and every unit of work to its trace, as "WHERE: WHAT", where WHERE is the stage that is
running, the stage after which it happens, or "background" for the thread that writes checkpoints;
there it can send itself a signal or fail.

Protocol, one JSON object a line: {"arguments": [...], "workdir", "stdout", "stderr", "trace" (or
null): paths, "signals": {event: signal number}, "faults": {event: errno}, "file_limit": bytes of a
file (or null), "environment": {name: value}} -> {"code": exit code, negative for a signal}.
"""

import functools
import gc
import json
import os
import re
import resource
import signal
import sys
import threading

# Everything that a run would import, so that a child starts at once.
import orbax.checkpoint
import transformers
from jaxlib.mlir.dialects import mhlo
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from halos_jax import main, metrics
from halos_jax.checkpoints import store as checkpoints
from halos_jax.models.files import export
from halos_jax.rewards import feedback, samples, scorers
from halos_jax.rounds import evaluation, stages
from halos_jax.rounds.refill import gather
from halos_jax.tasks import launch, overview
from halos_jax.tasks import online as loop
from halos_jax.tasks import train as single
from halos_jax.training import step

PRELOADED = (orbax.checkpoint, transformers, AutoTokenizer, GenerationConfig, LlamaConfig)
PRELOADED += (PreTrainedTokenizerFast, mhlo, feedback, launch, loop, overview, samples, single)


class Observer:
    """Writes the trace of a child and does what was ordered for its events."""

    def __init__(self, request: dict) -> None:
        self._workdir = os.path.abspath(request["workdir"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._trace = os.open(request["trace"], flags, 0o644) if request["trace"] else None
        self._signals, self._faults = request["signals"], request["faults"]
        self._lock = threading.Lock()
        self._where = "start"
        self._os_write, self._os_kill = os.write, os.kill

    def report(self, what: str) -> None:
        """Note an event, and do what was ordered for it."""
        with self._lock:
            is_main = threading.current_thread() is threading.main_thread()
            event = f"{self._where if is_main else 'background'}: {what}"
            if self._trace is not None:
                self._os_write(self._trace, (event + "\n").encode())
            number = self._signals.pop(event, None)
            if number is not None:
                self._os_kill(os.getpid(), number)
            code = self._faults.pop(event, None)
            if code is not None:
                raise OSError(code, os.strerror(code))

    def path_name(self, path) -> str | None:
        """Name a path inside the workdir (None: outside), without what differs between runs."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self._workdir + os.sep):
            return None
        name = path[len(self._workdir) + 1 :]
        name = re.sub(r"\.[0-9a-f]{8}(?=\.(partial|old)(/|$))", "", name)  # of an export
        return re.sub(r"checkpoint-tmp.*?(?=/|$)", "checkpoint-tmp", name)

    def wrap_path(self, module, name: str) -> None:
        """Report a function of a path (its last positional one) before and after it."""
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapped(*arguments, **options):
            target = None if options.get("dir_fd") is not None else arguments[-1]
            label = self.path_name(target) if target is not None else None
            if label is None or re.match(r"checkpoints/\d+/", label):  # Orbax's own names
                return original(*arguments, **options)
            self.report(f"before {name} {label}")
            result = original(*arguments, **options)
            self.report(f"after {name} {label}")
            return result

        setattr(module, name, wrapped)

    def wrap(self, module, name: str, describe, *, stage: bool = False) -> None:
        """Report a function, described by its arguments; a stage gives the place its name."""
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapped(*arguments, **options):
            label = describe(*arguments, **options)
            if stage:
                self._where = label
            self.report(f"before {name} {label}")
            result = original(*arguments, **options)
            self.report(f"after {name} {label}")
            if stage:
                self._where = f"after {label}"
            return result

        setattr(module, name, wrapped)

    def wrap_train_step(self) -> None:
        """Report every optimizer step."""
        original = step.compile_train_step

        def compile_train_step(*arguments):
            holder = type("Holder", (), {"train_step": staticmethod(original(*arguments))})
            self.wrap(holder, "train_step", lambda state, *_: str(int(state.step) + 1))
            return holder.train_step

        step.compile_train_step = compile_train_step


def observe(request: dict) -> None:
    """Wrap what writes, removes or computes, all over the program."""
    observer = Observer(request)
    for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
        observer.wrap_path(os, name)
    for module, name in (
        *((stages, name) for name in ("sample", "score", "feedback", "train")),
        *((evaluation, name) for name in ("evaluate", "final_test")),
    ):
        observer.wrap(module, f"{name}_stage", functools.partial(_name_stage, name), stage=True)
    for name in ("sample_extent", "score_extent", "join_extents"):
        observer.wrap(gather, name, functools.partial(_name_extent, name), stage=True)
    observer.wrap(stages, "sample_shard", lambda *_, round, **__: f"{round}")
    observer.wrap(scorers, "_score_items", lambda *_: "")
    observer.wrap(export, "_write_tensors", lambda *_: "export", stage=True)
    observer.wrap(checkpoints.Checkpoints, "save", lambda self, step, *_: f"{step} {self._next}")
    observer.wrap(checkpoints.Checkpoints, "verify", lambda self, save_id: str(save_id))
    observer.wrap(
        metrics.MetricWriter,
        "_write_now",
        lambda self, held: f"{held.step} {sorted(held.values)[-1]}",
    )
    observer.wrap_train_step()


def _name_stage(name, run, *arguments, round=None, **_) -> str:
    folder = next(value for value in arguments if hasattr(value, "name"))
    # The stages of a task that stands alone are those of its workdir.
    return f"{int(folder.name) if folder.name.isdigit() else folder.name} {name}"


def _name_extent(name, run, *arguments) -> str:
    manifest = next(value for value in arguments if hasattr(value, "stop"))
    return f"{manifest.round} {name} {manifest.stop}"


def run_child(request: dict) -> None:
    """Run the program as the command line would; never returns."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for target, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, flags, 0o644), target)
    code = 1
    try:
        observe(request)
        os.environ.update(request["environment"])
        if request["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        sys.argv = ["halos_jax.main", *request["arguments"]]
        main.run()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Run one request after the other until stdin ends."""
    # A child's collector need not look through what is imported, whose pages it would copy.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            run_child(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
