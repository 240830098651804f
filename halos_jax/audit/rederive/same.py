"""Whether a stage was computed on what this job runs on: then its results are equal to the bit."""

from halos_jax.workdir import execution
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.workspace import Workspace


def is_same(workspace: Workspace, manifest: Manifest, stage: str) -> bool:
    """Tell whether the results of a stage must come out the same to the last bit.

    They must if all devices, versions, flags and settings that it was computed on are recorded and
    are those of this job. Of an earlier version's run they are not recorded.
    """
    records = execution.find_executions(manifest, stage)
    now = execution.describe_execution(workspace.config, workspace.mesh)
    return bool(records) and all(execution.are_equal_to_the_bit(one, now) for one in records)


def explain_other(workspace: Workspace, manifest: Manifest, stage: str) -> str:
    """Say in what a stage's execution differs from this job's; "" if in nothing."""
    records = execution.find_executions(manifest, stage)
    if not records:
        return "what it was computed on is not recorded"
    now = execution.describe_execution(workspace.config, workspace.mesh)
    names = [name for one in records for name in execution.find_differences(one, now)]
    if names:
        return f"it was computed on something else ({', '.join(dict.fromkeys(names))})"
    return "" if now["deterministic"] else "this device adds up in an order that changes"
