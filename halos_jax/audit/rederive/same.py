"""Whether a stage was computed on what this job runs on: then its results are equal to the bit.

On a GPU or TPU that also takes the very programs of the run: a program that is compiled once more
may have other kernels, since compilers choose these by timing them. A run keeps its programs in the
workdir (`compilation_cache/`), and a verification executes a copy of them.
"""

from collections.abc import Iterator

import jax

from halos_jax import sharding
from halos_jax.audit.findings import Finding, not_checked, passed
from halos_jax.audit.opened import Opened
from halos_jax.config import ModelConfig
from halos_jax.tasks.launch import list_compiled
from halos_jax.workdir import execution
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.workspace import Workspace


def is_same(workspace: Workspace, manifest: Manifest, stage: str) -> bool:
    """Tell whether the results of a stage must come out the same to the last bit.

    They must if all devices, versions, flags and settings that it was computed on are recorded and
    are those of this job. Of an earlier version's run they are not recorded. What is compiled while
    the results are made again is not known yet: `explain_programs` tells it after that.
    """
    records = execution.find_executions(manifest, stage)
    now = execution.describe_execution(workspace.config, workspace.mesh)
    are_equal = all(execution.are_equal_to_the_bit(one, now) for one in records)
    is_other = bool(sharding.take_from_first(int(bool(explain_programs()))))
    return bool(records) and are_equal and not is_other


def explain_other(workspace: Workspace, manifest: Manifest, stage: str) -> str:
    """Say in what a stage's execution differs from this job's; "" if in nothing."""
    records = execution.find_executions(manifest, stage)
    if not records:
        return "what it was computed on is not recorded"
    now = execution.describe_execution(workspace.config, workspace.mesh)
    names = [name for one in records for name in execution.find_differences(one, now)]
    if names:
        return f"it was computed on something else ({', '.join(dict.fromkeys(names))})"
    if not now["deterministic"]:
        return "this device adds up in an order that changes"
    return explain_programs()


def explain_made(
    settings: ModelConfig, workspace: Workspace, manifest: Manifest, stage: str
) -> str:
    """Say why a model that is loaded here may have another fingerprint than in a stage; "": it may
    not. Weights that are drawn, or averaged for added tokens, are made anew as they are loaded."""
    if not (settings.random_init or settings.added_tokens):
        return ""
    why = explain_other(workspace, manifest, stage)
    return (
        f"weights that are made as they are loaded may round otherwise here: {why}" if why else ""
    )


def explain_programs() -> str:
    """Say why the programs executed so far may not be those of the run; "": they are.

    Of several processes only the first knows it.
    """
    if jax.default_backend() == "cpu":  # which nothing is timed for
        return ""
    names = list_compiled()
    if names is None:
        return "the run's compiled programs (compilation_cache/) are not there"
    return f"programs had to be compiled again: {name_programs(names)}" if names else ""


def check_programs(opened: Opened) -> Iterator[Finding]:
    """Say whether the run's own compiled programs were executed, where it keeps them."""
    names, what = list_compiled(), "what was executed are the run's programs (compilation_cache/)"
    if names:
        why = f"{len(names)} had to be compiled again: {name_programs(names)}"
        yield not_checked("programs", what, why)
    elif names is not None:
        yield passed("programs", what, 0, 0, why="none had to be compiled again")


def name_programs(names: list[str]) -> str:
    """Return names of programs as a text: "2 x jit_step, jit_admit"."""
    counts = {name: names.count(name) for name in sorted({*names})}
    shown = [f"{count} x {name}" if count > 1 else name for name, count in counts.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
