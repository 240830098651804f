"""Run batches of the study on the GPUs of one machine, several runs on each.

    python colabs/gsm8k_study/run.py A G --folder=DATA --runs=RUNS --results=RESULTS --gpus=4

A run that is cut by the limit goes on when the same command is given again, as long as its workdir
in RUNS is there; what it has done by then is collected in any case. RESULTS gets a JSON file for
each step of a run. See README.md for the folder DATA.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import collect
import plan
from plan import Run, Step

ROOT = Path(__file__).parents[2]
MEMORY = 0.9  # share of a GPU's memory that its runs get together
ATTEMPTS = 2

Ended = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of a GPU. `size` is that share; `place` is the folder for the workdirs."""

    gpu: int
    size: float
    place: Path


@dataclasses.dataclass
class Active:
    """A run in a slot: which of its steps is running, since when, and how often it was tried."""

    run: Run
    slot: Slot
    step: int = 0
    attempt: int = 1
    process: subprocess.Popen[bytes] | None = None
    log: TextIO | None = None
    began: float = 0.0

    @property
    def now(self) -> Step:
        """The step that is running."""
        return self.run.steps[self.step]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says; see `parse`."""

    folder: Path
    runs: tuple[Path, ...]
    results: Path
    pack: Path | None
    per_gpu: tuple[int, ...]
    limit: float
    stagger: float
    fields: tuple[str, ...]
    keep: bool


def make_slots(per_gpu: Sequence[int], places: Sequence[Path]) -> list[Slot]:
    """Return the slots of each GPU, first one of each, then the next; places take turns."""
    found = []
    for layer in range(max(per_gpu)):
        for gpu, count in enumerate(per_gpu):
            if layer < count:
                place = places[len(found) % len(places)]
                found.append(Slot(gpu, 1 / count, place))
    return found


def choose_slot(
    free: Sequence[Slot], active: Iterable[Active], run: Run, *, is_kept: bool
) -> Slot | None:
    """Return the free slot for a run: on the GPU with the least work in hand.

    Args:
      is_kept: whether GPUs that are not shared are kept for runs that want one for themselves.
    """
    load: dict[int, float] = {}
    for one in active:
        load[one.slot.gpu] = load.get(one.slot.gpu, 0.0) + one.run.seconds
    fitting = [slot for slot in free if not is_kept or (slot.size == 1) == run.is_alone]
    return min(fitting, key=lambda slot: load.get(slot.gpu, 0.0), default=None)


def make_command(step: Step, settings: Settings, workdir: Path) -> list[str]:
    """Return the command of a step."""
    names = {"folder": str(settings.folder), "runs": str(workdir.parent)}
    evaluated = workdir.with_name(workdir.name.removesuffix(plan.LAST))
    saved = [int(path.name) for path in evaluated.glob("checkpoints/[0-9]*")]
    names["last"] = str(max(saved, default=0))
    fields = {name: value.format(**names) for name, value in step.fields.items()}
    return [
        sys.executable,
        "-m",
        "halos_jax.main",
        f"--config={step.preset.format(**names)}",
        f"--config.workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *(f"--config.{field}" for field in settings.fields),
    ]


def start(active: Active, settings: Settings, cache: Path) -> None:
    """Start the step of a run, or go on with it."""
    workdir = active.slot.place / active.now.name
    workdir.mkdir(parents=True, exist_ok=True)
    programs = workdir / "compilation_cache"
    if not programs.exists() and active.attempt == 1:
        programs.symlink_to(cache, target_is_directory=True)
    elif active.attempt > 1 and programs.is_symlink():
        programs.unlink()  # in case a program of another process does not run here
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(active.slot.gpu),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY * active.slot.size:.3f}",
        "PYTHONUNBUFFERED": "1",
    }
    active.log = (settings.results / f"{active.now.name}.log").open("a", encoding="utf-8")
    active.began = time.time()
    active.process = subprocess.Popen(
        make_command(active.now, settings, workdir),
        cwd=ROOT,
        env=environment,
        stdout=active.log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def finish(name: str, batch: str, workdir: Path, results: Path, ended: Ended) -> dict[str, Any]:
    """Write what is on disk of a step into `results`; return it."""
    path = results / f"{name}.json"
    attempts = [*collect.read_json(path).get("attempts", []), dict(ended)]
    record = {"name": name, "batch": batch, "attempts": attempts, **collect.collect_run(workdir)}
    text = json.dumps(record, separators=(",", ":"), sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    return record


def end_now(active: Active, code: int | None) -> Ended:
    """Return how an attempt has ended, with None as the code of one that was cut."""
    seconds = round(time.time() - active.began, 1)
    return {"seconds": seconds, "code": code, "share": round(active.slot.size, 3)}


def describe(record: dict[str, Any]) -> str:
    """Return a line on a step: how it ended, its rounds, and the accuracies."""
    ended = record["attempts"][-1]
    rounds = [one for one in record["rounds"] if "held_out" in one]
    shown = [f"{record['name']}: code {ended['code']}, {ended['seconds']:.0f} s"]
    if rounds:
        shares = [share_right(one["held_out"]) for one in rounds]
        best = max(range(len(shares)), key=lambda index: shares[index])
        shown.append(
            f"held out {shares[0]:.1%} -> {shares[-1]:.1%} in round {rounds[-1]['round']} "
            f"(best {shares[best]:.1%} in {rounds[best]['round']})"
        )
    tests = [share_right(one["test"]) for one in record["rounds"] if "test" in one]
    if tests:
        shown.append("test " + " -> ".join(f"{share:.1%}" for share in tests))
    if "right" in record:
        shown.append(f"right {share_right(record['right']):.1%}")
    return ", ".join(shown)


def share_right(counts: dict[str, Any]) -> float:
    """Return the share of right samples of a record of `collect.count_right`."""
    right = collect.read_right(counts["right"])
    return sum(right) / max(len(right) * counts["samples"], 1)


class Study:
    """The state of one command: runs that wait, runs in slots, and slots that are free."""

    def __init__(self, runs: Sequence[Run], settings: Settings) -> None:
        self.settings = settings
        self.waiting = list(runs)
        self.active: list[Active] = []
        self.free = make_slots(settings.per_gpu, settings.runs)
        self.has_whole = any(slot.size == 1 for slot in self.free)
        self.unfinished: list[str] = []
        self.cache = settings.runs[0] / "programs"
        self.began = time.time()
        for folder in (settings.results, self.cache, *settings.runs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Run all runs or as many as the limit allows; return the number of unfinished ones."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        while self.waiting or self.active:
            elapsed = time.time() - self.began
            if elapsed > self.settings.limit:
                self.cut()
                break
            self.fill(elapsed)
            for active in list(self.active):
                assert active.process is not None
                code = active.process.poll()
                if code is not None:
                    self.end(active, code)
            time.sleep(0.2)
        self.unfinished += [run.name for run in self.waiting]
        self.pack()
        say(f"unfinished: {self.unfinished or 'none'}")
        return len(self.unfinished)

    def stop(self, *_: object) -> None:
        """End the study early, as its limit would."""
        self.began = -math.inf

    def fill(self, elapsed: float) -> None:
        """Start runs in free slots; at first one a GPU, so that the others find its programs."""
        for run in list(self.waiting):
            if elapsed < self.settings.stagger:
                busy = {one.slot.gpu for one in self.active}
                free = [slot for slot in self.free if slot.gpu not in busy]
            else:
                free = self.free
            is_kept = self.has_whole and any(one.is_alone for one in self.waiting)
            slot = choose_slot(free, self.active, run, is_kept=is_kept)
            if slot is None:
                continue
            self.waiting.remove(run)
            self.free.remove(slot)
            steps = [self.is_done(step) for step in run.steps]
            if all(steps):
                say(f"{run.name}: done before")
                self.free.append(slot)
                continue
            place = find_place(run, self.settings.runs) or slot.place
            active = Active(run, dataclasses.replace(slot, place=place), steps.index(False))
            start(active, self.settings, self.cache)
            self.active.append(active)
            say(f"{active.now.name}: started on GPU {slot.gpu}")

    def is_done(self, step: Step) -> bool:
        """Tell whether a command before this one has ended a step."""
        attempts = collect.read_json(self.settings.results / f"{step.name}.json").get("attempts")
        return bool(attempts) and attempts[-1]["code"] == 0

    def end(self, active: Active, code: int) -> None:
        """Collect a step that has ended, and start the next one, or the same once more."""
        assert active.log is not None
        active.log.close()
        say(describe(finish(*self.identify(active), end_now(active, code))))
        if code == 0:
            active.step, active.attempt = active.step + 1, 1
        else:
            log = self.settings.results / f"{active.now.name}.log"
            say("\n".join(log.read_text(errors="replace").splitlines()[-12:]))
            active.attempt += 1
        is_over = active.step == len(active.run.steps) or active.attempt > ATTEMPTS
        if not is_over:
            start(active, self.settings, self.cache)
            return
        if code:
            self.unfinished.append(active.run.name)
        elif not self.settings.keep:
            for step in active.run.steps:
                clear(active.slot.place / step.name)
        self.active.remove(active)
        self.free.append(active.slot)
        self.pack()

    def cut(self) -> None:
        """Kill what is running, and collect what it has done; a resume is exact all the same."""
        for active in self.active:
            assert active.process is not None
            os.killpg(active.process.pid, signal.SIGKILL)
        for active in self.active:
            assert active.process is not None
            active.process.wait()
        with concurrent.futures.ProcessPoolExecutor() as pool:
            jobs = [
                pool.submit(finish, *self.identify(one), end_now(one, None)) for one in self.active
            ]
            for job in jobs:
                say(f"cut: {describe(job.result())}")
        self.unfinished += [one.run.name for one in self.active]
        self.active.clear()

    def identify(self, active: Active) -> tuple[str, str, Path, Path]:
        """Return the name and the batch of the step that is running, its workdir, the results."""
        name = active.now.name
        return name, active.run.batch, active.slot.place / name, self.settings.results

    def pack(self) -> None:
        """Write all results, and the ends of the logs, into one archive, if one is asked for."""
        if self.settings.pack is None:
            return
        partial = self.settings.pack.with_suffix(".partial")
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(self.settings.results.glob("*.json")):
                archive.add(path, path.name)
            for path in sorted(self.settings.results.glob("*.log")):
                end = path.with_suffix(".end")
                end.write_bytes(path.read_bytes()[-20_000:])
                archive.add(end, f"logs/{path.name}")
        partial.replace(self.settings.pack)


def find_place(run: Run, places: Iterable[Path]) -> Path | None:
    """Return the folder in which a command before this one has begun a run."""
    return next((one for one in places if (one / run.steps[0].name).is_dir()), None)


def clear(workdir: Path) -> None:
    """Remove what is large from the workdir of a run that is done and collected."""
    for name in ("checkpoints", "final"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def say(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def parse(arguments: Sequence[str]) -> tuple[list[Run], Settings]:
    """Return the runs and the settings that a command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="batches (A, B, ...) or runs")
    parser.add_argument("--folder", type=Path, required=True, help="the model and the questions")
    parser.add_argument("--runs", required=True, help="folders for workdirs, with commas between")
    parser.add_argument("--results", type=Path, required=True, help="folder for the results")
    parser.add_argument("--pack", type=Path, help="archive of the results, .tar.gz")
    parser.add_argument("--per_gpu", default="4", help="runs on each GPU at a time: 4,4,4,4")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which all is cut")
    parser.add_argument("--stagger", type=float, default=0, help="seconds with one run a GPU")
    parser.add_argument("--field", action="append", default=[], help="field=value for every run")
    parser.add_argument("--but", default="", help="regular expression: runs to leave out")
    parser.add_argument(
        "--keep", action="store_true", help="keep checkpoints of runs that are done"
    )
    given = parser.parse_args(arguments)
    runs = plan.choose_runs(given.names)
    if given.but:
        runs = [run for run in runs if not re.search(given.but, run.name)]
    settings = Settings(
        folder=given.folder.absolute(),
        runs=tuple(Path(one).absolute() for one in given.runs.split(",")),
        results=given.results.absolute(),
        pack=given.pack.absolute() if given.pack else None,
        per_gpu=tuple(map(int, given.per_gpu.split(","))),
        limit=given.limit,
        stagger=given.stagger,
        fields=tuple(given.field),
        keep=given.keep,
    )
    return runs, settings


if __name__ == "__main__":
    sys.exit(bool(Study(*parse(sys.argv[1:])).run()))
