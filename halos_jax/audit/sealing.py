"""Whether a manifest without a seal was completed by a version that seals each one."""

import json

from halos_jax.audit.opened import Opened
from halos_jax.workdir import changes, execution, intact
from halos_jax.workdir.manifests import Manifest

# Fields of a manifest, and a section of config.json, that came together with the seals.
_FIELDS = ("executed", "executions", "sampled_by", "trained", "chain")
_SECTION = "verify"
_TEST = "test"  # a later version may have added it to a complete manifest of an earlier one


def explain_missing(opened: Opened, manifest: Manifest) -> str | None:
    """Return what shows that a complete manifest without a seal had one; None if nothing does.

    It had none if a version before seals completed it, even if a later one has carried the run on.
    """
    if manifest.executed.keys() - {_TEST} or manifest.trained:
        return "it says what it was executed on, as versions that seal do"
    plain = json.loads((opened.folder(manifest) / intact.MANIFEST).read_text(encoding="utf-8"))
    if _TEST not in manifest.executed and not plain.keys().isdisjoint(_FIELDS):
        return "it has fields that versions that seal write"
    starts = execution.read_starts(opened.workdir)
    if starts and starts[0].stage and starts[0].round <= manifest.round:
        return f"by {execution.FILE}, a version that seals completed it"
    config = changes.read_plain(opened.workdir / changes.FILE)
    if not starts and _SECTION in config:
        return f"{changes.FILE} is of a version that seals; its {execution.FILE} is missing"
    return None
