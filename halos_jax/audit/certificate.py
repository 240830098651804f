"""The certificate beside a run's weights: compared with the workdir, and made anew."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax import storage
from halos_jax.audit.findings import Finding, compare, count_outcomes, differs, not_checked
from halos_jax.audit.opened import Opened
from halos_jax.workdir import intact
from halos_jax.workdir.execution import describe_execution
from halos_jax.workdir.seals import certificate

logger = logging.getLogger(__name__)

NAME = "certificate"
CARD = "README.md"


def check_certificate(opened: Opened, others: Sequence[Finding]) -> Iterator[Finding]:
    """Compare each field of the certificate with what the workdir gives for it.

    Args:
      others: what all other checks of this workdir have found, to compare its claims with.
    """
    folder = opened.workdir / intact.FINAL
    if not folder.is_dir():
        return
    found = certificate.read_certificate(folder / certificate.FILE)
    if found is None:
        why = f"there is no {intact.FINAL}/{certificate.FILE}: an earlier version made the export"
        yield not_checked(NAME, "the certificate of the run", why)
        return
    if not certificate.is_whole(found):
        yield differs(NAME, "its hash is that of its fields", "it was edited", 1, unit="hash")
    count = found["chain"]["manifests"]
    made = certificate.make_certificate(opened.workdir, folder, count=count)
    fields = ["task", "chain", "weights"]
    if opened.is_finished:  # else it is of what the run was before it went on
        fields += ["config", "inputs", "metrics"]
    wrong = [f"{name} is not that of the workdir" for name in fields if found[name] != made[name]]
    unknown = sorted(found.keys() ^ made.keys())
    wrong += [f"{', '.join(unknown)}: missing or unknown"] if unknown else []
    yield compare(NAME, "its fields are those of the workdir", wrong, len(fields), unit="fields")
    if found["verified"] is not None:
        yield _check_claims(opened, found["verified"], others)


def _check_claims(
    opened: Opened, verified: Mapping[str, Any], others: Sequence[Finding]
) -> Finding:
    """Compare what a certificate says was verified with what there is to verify."""
    what = "what it says was verified is there to verify"
    if verified["settings"] != _describe_settings(opened) or not opened.is_finished:
        why = "it was verified with other settings (verify.*), or before the run went on"
        return not_checked(NAME, what, why, len(verified["findings"]), "claims")
    now = {_key(one): one for one in summarise(others)}
    wrong = []
    for claim in verified["findings"]:
        known = now.get(_key(claim))
        if known is not None and max(claim["checked"], claim["total"]) > known["total"]:
            said = f"{claim['checked']} of {claim['total']} {claim['unit']}"
            wrong.append(f"it claims {said} for {claim['check']}, there are {known['total']}")
    if verified["counts"]["differs"]:
        wrong.append("it says itself that something differs")
    if not opened.ledger.is_empty and verified["ledger"] not in opened.ledger.chains:
        wrong.append("the ledger has no line that it was verified at")
    return compare(NAME, what, wrong, len(verified["findings"]), unit="claims")


def _describe_settings(opened: Opened) -> dict[str, Any]:
    """Return what was looked at: `config.verify` without the place of the report."""
    settings = dataclasses.asdict(opened.given.verify)
    return {name: value for name, value in settings.items() if name != "output"}


def _key(claim: Mapping[str, Any]) -> tuple[str, str]:
    return claim["check"], claim["what"]


def summarise(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return the findings without their places: one record for each check, text and outcome."""
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for one in findings:
        if one.check == NAME:
            continue
        empty = {
            "check": one.check,
            "what": one.what,
            "outcome": one.outcome,
            "unit": one.unit,
            "places": 0,
            "checked": 0,
            "total": 0,
        }
        record = found.setdefault((one.check, one.what, one.outcome, one.unit), empty)
        record["places"] += 1
        record["checked"] += one.checked
        record["total"] += one.total
    return list(found.values())


def renew_certificate(opened: Opened, findings: Sequence[Finding], mesh: Any) -> Path | None:
    """Replace the certificate of a finished run in which nothing differs; return its path.

    None: the run is not finished, has no exported weights, or something differs; or what the
    certificate says was verified of the same run is more.
    """
    folder, counts = opened.workdir / intact.FINAL, count_outcomes(findings)
    path = folder / certificate.FILE
    is_right = opened.is_finished and not counts["differs"]
    if not (is_right and folder.is_dir()):
        return None
    before = (certificate.read_certificate(path) or {}).get("verified")
    if (
        before is not None
        and before["ledger"] == opened.ledger.head
        and before["counts"]["passed"] > counts["passed"]
    ):
        logger.info("%s stays: it is of a verification of more checks", path)
        return None
    record = describe_execution(opened.given, mesh)
    verified = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": record["device"],
        "devices": record["devices"],
        "versions": record["versions"],
        "ledger": opened.ledger.head,
        "settings": _describe_settings(opened),
        "counts": counts,
        "findings": summarise(findings),
    }
    made = certificate.make_certificate(opened.workdir, folder, verified=verified)
    certificate.write_certificate(path, made)
    _write_card(opened, folder, made)
    return path


def _write_card(opened: Opened, folder: Path, made: Mapping[str, Any]) -> None:
    """Say in the model card of an export, if it has one, what was verified."""
    entry, card = opened.ledger.find(folder), folder / CARD
    if not card.is_file() or CARD in (entry or {}).get("files", {}):
        return
    text = card.read_text(encoding="utf-8", errors="surrogateescape")  # a user may have edited it
    before, after = certificate.split_card(text)
    new = before.rstrip("\n") + "\n\n" + certificate.describe_certificate(made) + after
    if new != text:
        storage.write_bytes_atomic(card, new.encode(errors="surrogateescape"))
