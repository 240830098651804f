"""The policy of another run that a run has started from: what the run says of it, and that run."""

from collections.abc import Iterator
from pathlib import Path

from halos_jax.audit.findings import Finding, compare, not_checked
from halos_jax.audit.opened import Opened
from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.policies.branch import hash_policy, read_origin
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import round_folder
from halos_jax.workdir.seals import chain


def check_branch(opened: Opened) -> Iterator[Finding]:
    """Compare the records of a branch's start with each other, and with the run that it is of.

    Its arrays are compared with their checksums as those of all checkpoints, and with the
    fingerprint when the samples of round 1 are checked.
    """
    branch = opened.config.branch
    if not branch.workdir:
        return
    checkpoints = read_checkpoints(opened.workdir / "checkpoints")
    try:
        origin = read_origin(checkpoints)
    finally:
        checkpoints.close()
    what, wrong = "the first checkpoint is the start that the run names", list[str]()
    if not origin:
        if opened.manifests or opened.is_finished:
            wrong.append("there is no checkpoint of round 0, which a branch starts from")
            yield compare("inputs", what, wrong, 1, unit="policies")
        return
    first = opened.manifests[0] if opened.is_online and opened.manifests else None
    if first is not None and dict(first.origin) != origin:
        wrong.append("round 0 and the checkpoint say different things of where it comes from")
    if first is not None and first.trained and first.trained != origin["fingerprint"]:
        wrong.append(f"round 0 has the policy {first.trained[:12]}, the checkpoint another one")
    asked = (branch.round or origin["round"], branch.optimizer)
    if asked != (origin["round"], origin["optimizer"]):
        wrong.append("config.json asks for another start")
    yield compare("inputs", what, wrong, 1, unit="policies")
    yield _check_source(origin)


def _check_source(origin: dict[str, object]) -> Finding:
    """Compare what a run has recorded of the other run with what that has now."""
    what, workdir = "the run that it branched from has that policy", Path(str(origin["workdir"]))
    found = hash_policy(workdir, int(str(origin["checkpoint"])))
    if not found:
        why = f"{workdir} is gone, or has deleted that checkpoint (checkpoint.keep)"
        return not_checked("inputs", what, why, 1, "policies")
    wrong = [] if found == origin["sums"] else [f"{workdir} holds another policy in that place"]
    manifest = manifests.load_manifest(round_folder(workdir, int(str(origin["round"]))))
    if origin["manifest"] and chain.find_digest(manifest) != origin["manifest"]:
        wrong.append(f"the manifest of round {origin['round']} in {workdir} is another one")
    return compare("inputs", what, wrong, 1, unit="policies")
