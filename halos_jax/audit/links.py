"""The chain of manifests: each follows from the one before, the config, the inputs, its files."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halos_jax.audit import sealing
from halos_jax.audit.findings import Finding, compare, not_checked, passed
from halos_jax.audit.opened import Opened
from halos_jax.checkpoints.shelf import find_sums
from halos_jax.config.schema import flatten, to_plain
from halos_jax.rounds.outcome.decisions import find_start, name_policy
from halos_jax.workdir import execution
from halos_jax.workdir.changes import FILE as CONFIG
from halos_jax.workdir.changes import adopt_recorded, drop_segments, find_changes, read_plain
from halos_jax.workdir.manifests import Manifest
from halos_jax.workdir.seals import chain
from halos_jax.workdir.seals.defaults import list_defaults


def check_chain(opened: Opened) -> Iterator[Finding]:
    """Check that no manifest is missing, changed or moved, and what each has the hash of."""
    done = [one for one in opened.manifests if one.next_stage is None]
    if not done:
        return
    wrong, left = list(_find_gaps(opened)), 0
    before: Manifest | None = None
    for manifest in done:
        name = _name(opened, manifest)
        if manifest.chain:
            broken = chain.find_broken(manifest, chain.find_digest(before))
            wrong += [f"{name}: {line}" for line in broken]
        elif before is not None and before.chain:
            wrong.append(f"{name} is not sealed, though the one before it is")
        elif (reason := sealing.explain_missing(opened, manifest)) is not None:
            wrong.append(f"{name} is not sealed, though it was: {reason}")
        else:
            left += 1
        before = manifest
    sealed = [one for one in done if one.chain]
    if wrong or sealed:
        what = "manifests follow from each other"
        yield compare("chain", what, wrong, len(sealed), len(done), "manifests")
    if left:
        why = "an earlier version wrote them, which sealed nothing"
        yield not_checked("chain", "manifests without a seal", why, left, "manifests")
    if sealed:
        yield _check_config(opened, sealed)
        yield from _check_inputs(opened, sealed)
    if opened.is_online:
        yield from _check_rows(opened, sealed)
        yield from _check_sums(opened, sealed)


def _find_gaps(opened: Opened) -> Iterator[str]:
    """Yield a line for each round that is missing, or begins where another one should."""
    if not opened.is_online:
        return
    stop = opened.config.rounds.num_skip
    for expected, manifest in enumerate(opened.manifests):
        if manifest.round != expected:
            yield f"round {expected} is missing"
            return
        if not manifest.round:
            continue
        if manifest.start != stop:
            yield f"round {manifest.round} begins at prompt {manifest.start}, not {stop}"
        stop = manifest.stop
        start = find_start(opened.workdir, manifest.round)
        policy = name_policy(opened.config, start)
        if manifest.policy != policy:
            yield f"round {manifest.round} samples from {manifest.policy!r}, not {policy!r}"


def _check_config(opened: Opened, sealed: Sequence[Manifest]) -> Finding:
    recorded, wrong = execution.read_defaults(opened.workdir), []
    for one in sealed:
        name = one.chain.get("defaults")
        defaults = recorded.get(name) if name else None
        if name and defaults is None:
            wrong.append(f"{execution.FILE} has not the defaults that {_name(opened, one)} had")
        elif chain.hash_config(opened.history, one.round, defaults) != one.chain.get("config"):
            wrong.append(f"{_name(opened, one)} had another config")
    return compare("chain", "config.json is that of each", wrong, len(sealed), unit="manifests")


def _check_inputs(opened: Opened, sealed: Sequence[Manifest]) -> Iterator[Finding]:
    """Compare inputs.json with the newest manifest, and tell which inputs have changed before."""
    now, last = chain.hash_inputs(opened.workdir), sealed[-1].chain.get("inputs", {})
    grown = {path for segment in opened.history.segments for path in segment["changed"]}
    later = {
        path
        for segment in opened.history.segments
        if segment.get("round", 0) > sealed[-1].round
        for path in segment["changed"]
    }
    newest = _name(opened, sealed[-1])
    wrong, changed = list[str](), list[str]()
    for field in sorted(now.keys() | last.keys()):
        if now.get(field) == last.get(field):
            continue
        if field in later or _is_code(field):  # the run has sealed nothing since
            changed.append(f"{field} changed after {newest}")
        else:
            wrong.append(f"{field} is not what {newest} was made with")
    for before, after in itertools.pairwise(sealed):
        one, other = before.chain.get("inputs", {}), after.chain.get("inputs", {})
        for field in sorted(one.keys() | other.keys()):
            if one.get(field) == other.get(field):
                continue
            line = f"{field} changed before {_name(opened, after)}"
            (changed if field in grown or _is_code(field) else wrong).append(line)
    finding = compare(
        "chain", "inputs.json is that of the manifests", wrong, len(now), unit="inputs"
    )
    if changed and not wrong:
        why = "; ".join(changed) + " (allowed: code of the user's own, data that has grown)"
        finding = passed("chain", finding.what, len(now), unit="inputs", why=why)
    yield finding


def _is_code(field: str) -> bool:
    """Tell whether the files of a field are code of the user's own, which a run may go on with."""
    return not field.startswith(("data.", "model.", "lora."))


def _check_rows(opened: Opened, sealed: Sequence[Manifest]) -> Iterator[Finding]:
    """Compare the rows of metrics.jsonl with what each manifest says of those of its steps."""
    wrong, gone, before = [], [], None
    known = {one.round for one in sealed}
    total = 0
    for manifest in opened.manifests:
        if manifest.round in known:
            expected = manifest.chain.get("rows", {})
            found = chain.hash_rows(opened.workdir, *chain.find_steps(before, manifest))
            total += expected.get("count", 0)
            if found["count"] == 0 and expected.get("count"):
                gone.append(_name(opened, manifest))
            elif found != expected:
                said = f"{found['count']} rows, expected {expected.get('count')}"
                values = "other values" if found["count"] == expected.get("count") else said
                wrong.append(f"{_name(opened, manifest)} has {values}")
        before = manifest
    if sealed:
        what = "metrics.jsonl has the steps of each round"
        yield compare("metrics", what, wrong, total, unit="rows")
    if gone:
        why = f"metrics.jsonl has none of {', '.join(gone)}; it may have been moved away"
        yield not_checked("metrics", "rows of some rounds", why)


def _check_sums(opened: Opened, sealed: Sequence[Manifest]) -> Iterator[Finding]:
    """Compare the checkpoints that are left with the manifests of their rounds."""
    wrong, gone, looked = [], 0, 0
    for manifest in (one for one in sealed if one.chain.get("checkpoint")):
        sums = find_sums(opened.workdir / "checkpoints", manifest.round)
        if sums is None:
            gone += 1
            continue
        looked += 1
        if chain.hash_sums(sums) != manifest.chain["checkpoint"]:
            wrong.append(f"the checkpoint is not the one that {_name(opened, manifest)} ended with")
    if looked or wrong:
        what = "checkpoints are those of their rounds"
        yield compare("checkpoints", what, wrong, looked, unit="checkpoints")
    if gone:
        why = "the run has deleted them (checkpoint.keep)"
        yield not_checked("checkpoints", "those of other rounds", why, gone, "checkpoints")


def check_given(opened: Opened) -> Iterator[Finding]:
    """Compare the config of this command with that of the run, as far as results depend on it."""
    recorded = drop_segments(read_plain(opened.workdir / CONFIG))
    task = opened.config.task
    found = find_changes(recorded, to_plain(adopt_recorded(opened.given, recorded)))
    found = [one for one in found if one.mark.role_in(task) == "result" and not one.mark.place]
    before, now = _read_last_defaults(opened), list_defaults(opened.config)
    moved = [
        one
        for one in found
        if one.path in before and (one.old, one.new) == (before[one.path], now.get(one.path))
    ]
    wrong = [str(one) for one in found if one not in moved]
    count, what = len(list(flatten(recorded))), "config.json is this command's"
    finding = compare("config", what, wrong, count, unit="fields")
    if moved and not wrong:
        why = f"other defaults than when the run was started: {', '.join(map(str, moved))}"
        finding = passed("config", what, count, unit="fields", why=why)
    yield finding


def _read_last_defaults(opened: Opened) -> Mapping[str, Any]:
    """Return the defaults of the version that has started the run last; none if not recorded."""
    recorded = execution.read_defaults(opened.workdir)
    return recorded[next(reversed(recorded))] if recorded else {}


def _name(opened: Opened, manifest: Manifest) -> str:
    return f"round {manifest.round}" if opened.is_online else "the manifest"
