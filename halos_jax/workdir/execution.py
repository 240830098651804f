"""How a stage was executed: devices, versions, flags and settings, for its round's manifest.

    workdir/executions.jsonl   a line for each start of the run on something else than before, with
                               the stage that was next: {"round": 3, "stage": "train", "execution",
                               "defaults", "kept": [[3, "train"]]}

Of two computations with equal records the results are equal to the bit, on a GPU if the record is
`deterministic`. A stage that was begun in one execution and ended in another one names both, if
anything of it was kept.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import halos_jax
from halos_jax import devices, processes, storage
from halos_jax.config import Config, roles, schema
from halos_jax.workdir import intact, manifests
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.manifests import Manifest, round_folder, stages_of
from halos_jax.workdir.seals.defaults import list_defaults, name_defaults

FILE = "executions.jsonl"

Record = Mapping[str, Any]

_PACKAGES = ("jax", "jaxlib", "numpy", "optax")
_PLUGINS = {
    "gpu": (
        *(f"jax-cuda{number}-{part}" for number in (12, 13) for part in ("plugin", "pjrt")),
        *(f"nvidia-{part}-cu{number}" for number in (12, 13) for part in ("cublas", "cudnn")),
        "nvidia-cublas",
    ),
    "tpu": ("libtpu",),
}
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_ASIDE = ("--xla_dump", "--xla_gpu_per_fusion_autotune_cache_dir")  # flags that change no result
_SWITCHES = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
_TEST = "test"  # of the final policy: committed to the manifest of a round that is complete


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of the run on something else than before; `stage` of `round` was the next to do.

    Attributes:
      defaults: those that the config's fields had (`seals/defaults.py`); empty if a version wrote
        this that recorded none.
      kept: (round, stage) of what an execution before had begun, where a part of it was on disk;
        None if a version wrote this that did not look.
    """

    round: int
    stage: str
    execution: Record
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[tuple[int, str], ...] | None = None

    def takes_over(self, round: int, stage: str) -> bool:
        """Tell whether a part of `stage` of `round` may be of an execution before this start."""
        if self.kept is not None:
            return (round, stage) in self.kept
        return self.round >= round if stage == _TEST else (round, stage) in self.list_begun()

    def list_begun(self) -> list[tuple[int, str]]:
        """Return the stages that an execution may have begun, after which this was to do next."""
        begun = [(self.round, self.stage)]
        if self.stage == "sample":  # extents of a round are sampled and scored in turn
            begun.append((self.round, "score"))
        if self.stage == "train":  # committed only when the next round has been sampled
            later = self.round + 1
            begun += [(self.round, "evaluate"), (later, "sample"), (later, "score")]
        return begun


@dataclasses.dataclass(frozen=True)
class Executions:
    """The executions of a run up to now; the last one is that of this process."""

    starts: tuple[Start, ...] = ()

    def list_for(self, round: int, stage: str) -> list[Record]:
        """Return those in which a stage that is done now may have been computed, the last in full.

        Besides the last one they are those that ended before the stage was committed and left a
        part of it behind.
        """
        found = [
            before.execution
            for before, after in zip(self.starts, self.starts[1:], strict=False)
            if after.takes_over(round, stage)
        ]
        return [*found, *(start.execution for start in self.starts[-1:])]


# --------------------------------------------------------------------------- in manifests


def make_updates(executions: Executions, manifest: Manifest, stage: str) -> dict[str, Any]:
    """Return the fields of a manifest that say in which executions `stage` was computed."""
    found = {name_record(one): one for one in executions.list_for(manifest.round, stage)}
    if not found:
        return {}
    return {
        "executions": {**manifest.executions, **found},
        "executed": {**manifest.executed, stage: tuple(found)},
    }


def find_executions(manifest: Manifest, stage: str) -> list[Record]:
    """Return the executions in which a stage was computed; none if an earlier version did it."""
    return [manifest.executions[name] for name in manifest.executed.get(stage, ())]


def name_record(record: Record) -> str:
    """Return a name for a record that depends on its content alone."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def find_differences(one: Record, other: Record) -> dict[str, tuple[Any, Any]]:
    """Return path -> both values, for each entry in which two records differ."""
    both = [dict(schema.flatten(json.loads(json.dumps(record)))) for record in (one, other)]
    paths = sorted(both[0].keys() | both[1].keys())
    values = {path: (both[0].get(path), both[1].get(path)) for path in paths}
    return {path: pair for path, pair in values.items() if pair[0] != pair[1]}


def are_equal_to_the_bit(one: Record, other: Record) -> bool:
    """Tell whether the same computation gives the same bits in both executions."""
    return not find_differences(one, other) and bool(one.get("deterministic"))


# --------------------------------------------------------------------------- on disk


def begin_execution(
    ledger: Ledger, config: Config, mesh: Mesh, trained: tuple[int, int] = (0, 0)
) -> Executions:
    """Return the executions of a run of `config`, this one included; note it if it is another one.

    All processes call this, before the first stage that they do. Those that write nothing read
    what the first one has noted.

    Args:
      trained: rounds whose training is done by the newest checkpoint, and steps of the next one.
    """
    record, defaults = describe_execution(config, mesh), list_defaults(config)

    def note() -> Executions:
        starts = read_starts(ledger.workdir)
        if (
            starts
            and not find_differences(starts[-1].execution, record)
            and starts[-1].defaults == defaults
        ):
            return Executions(starts)
        to_do = Start(*find_next(ledger.workdir, config.task), record, defaults)
        kept = list_kept(ledger.workdir, config.task, to_do, trained)
        starts = (*starts, dataclasses.replace(to_do, kept=kept))
        lines = [json.dumps(dataclasses.asdict(start)) + "\n" for start in starts]
        path, data = ledger.workdir / FILE, "".join(lines).encode()
        storage.write_bytes_atomic(path, data, note=ledger.note_file)
        return Executions(starts)

    noted = processes.run_on_first(note)
    return noted or Executions(read_starts(ledger.workdir) or (Start(0, "", record),))


def list_kept(
    workdir: Path, task: str, next: Start, trained: tuple[int, int]
) -> tuple[tuple[int, str], ...]:
    """Return (round, stage) of what was begun before a start and has left a part of it on disk.

    Parts are shards, extents of a round, and checkpoints in the course of a round's training or
    at its end (`trained`, see `begin_execution`).
    """
    shards = {path.parent for path in intact.list_shards(workdir)}
    if task != "online":
        return ((next.round, next.stage),) if workdir in shards else ()

    def has_parts(round: int) -> bool:
        folder = round_folder(workdir, round)
        manifest = manifests.load_manifest(folder) if (folder / intact.MANIFEST).exists() else None
        extents = manifest is not None and not manifest.stages and bool(manifest.files)
        return folder in shards or extents

    kept = [one for one in next.list_begun() if has_parts(one[0])]
    if next.stage == "train" and trained > (next.round - 1, 0):
        kept.append((next.round, "train"))
    kept += [(round, _TEST) for round in range(next.round) if has_parts(round)]
    return tuple(dict.fromkeys(kept))


def read_starts(workdir: Path) -> tuple[Start, ...]:
    """Return the starts of a run that are noted, in order; none if a version before wrote it."""
    path = workdir / FILE
    text = path.read_text("utf-8") if path.exists() else ""
    return tuple(_parse_start(json.loads(line)) for line in text.splitlines())


def read_defaults(workdir: Path) -> dict[str, Mapping[str, Any]]:
    """Return the defaults that were recorded at the starts of a run, by their names, in order."""
    found = [one.defaults for one in read_starts(workdir) if one.defaults]
    return {name_defaults(one): one for one in found}


def _parse_start(plain: dict[str, Any]) -> Start:
    kept = plain.get("kept")
    pairs = None if kept is None else tuple((int(round), str(stage)) for round, stage in kept)
    return Start(**{**plain, "kept": pairs})


def find_next(workdir: Path, task: str) -> tuple[int, str]:
    """Return the round and the stage that a run is to do next; ("", if a job has none left)."""
    if task != "online":
        manifest = manifests.load_manifest(workdir)
        found = stages_of(0, task)[:1] if manifest is None else (manifest.next_stage or "",)
        return 0, "".join(found)
    round = 0
    while (manifest := manifests.load_manifest(round_folder(workdir, round))) is not None:
        if manifest.next_stage is not None:
            return round, manifest.next_stage
        round += 1
    return round, stages_of(round)[0]


# --------------------------------------------------------------------------- this process


def describe_execution(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the record of this process's execution of a run: JSON values alone.

    What may change the bits of a result is in it; paths, names of hosts and times are not.
    """
    kind = jax.default_backend()
    flags = {name: list_flags(os.environ.get(name, "")) for name in _VARIABLES}
    settings = dict(schema.flatten(schema.to_plain(config)))
    return {
        "platform": kind,
        "device": _name_devices(kind),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "versions": dict(_list_versions(kind)),
        "flags": {name: found for name, found in flags.items() if found},
        "switches": {name: getattr(jax.config, name, None) for name in _SWITCHES},
        "deterministic": kind != "gpu" or devices.is_deterministic(),
        "settings": {path: settings[path] for path in roles.list_fields(Config, "execution")},
    }


def list_flags(text: str) -> list[str]:
    """Return the flags in the value of a variable in order, without those that change no result."""
    return sorted(flag for flag in shlex.split(text) if not flag.startswith(_ASIDE))


def _name_devices(kind: str) -> str:
    """Return the kind of this job's devices; of CPUs also the model and the cores in use.

    XLA compiles for the CPU that it finds, and splits sums by its cores.
    """
    found = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    if kind != "cpu":
        return found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_find_cpu()}, {cores} cores"


def _find_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _list_versions(kind: str) -> Mapping[str, str]:
    """Return the versions of what computes: packages, the code of this one, runtime and driver."""
    found = {"halos_jax": halos_jax.__version__, "code": hash_code()}
    found["python"] = platform.python_version()
    for package in (*_PACKAGES, *_PLUGINS.get(kind, ())):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["runtime"] = " ".join(jax.devices()[0].client.platform_version.split())
    driver = Path("/proc/driver/nvidia/version")
    if kind == "gpu" and driver.exists():
        found["driver"] = driver.read_text("utf-8").partition("\n")[0].strip()
    return found


def hash_code() -> str:
    """Return a hash of this package's Python files, by name and content."""
    digest = hashlib.sha256()
    for name, data in _read_code():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def _read_code() -> Iterator[tuple[str, bytes]]:
    package = Path(halos_jax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), path.read_bytes()
