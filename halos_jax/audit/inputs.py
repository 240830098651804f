"""The files that a run has read, now: data, models, templates, the user's own code."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos_jax.audit.findings import Finding, compare, not_checked
from halos_jax.audit.opened import Opened
from halos_jax.config import Config
from halos_jax.errors import UserError
from halos_jax.policies import source
from halos_jax.tasks.inputs import Change, Files, compare_inputs, list_code, list_inputs
from halos_jax.workdir.intact import INPUTS


def check_inputs(opened: Opened) -> Iterator[Finding]:
    """Compare the files that the run has read with their fingerprints in inputs.json."""
    path = opened.workdir / INPUTS
    if not path.is_file():
        return
    known: dict[str, list[Mapping[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    files, lacking = _list_files(opened.config, known)
    compared = {field: entries for field, entries in known.items() if field in files}
    found = compare_inputs(compared, files)
    lacking += [str(one) for one in found if one.verdict == "missing"]
    wrong = [str(one) for one in found if not _is_allowed(one)]
    total = sum(len(entries) for entries in known.values())
    count = total - len(lacking)
    what = "what the run has read is what it was"
    if count > 0 or wrong:
        yield compare("inputs", what, wrong, max(count, 0), total, "files")
    for line in lacking:
        yield not_checked("inputs", what, line)
    for one in found:
        if one.verdict in ("grown", "new"):
            why = f"{one} since; the run has used what was there before"
            yield not_checked("inputs", "what was added", why)


def _is_allowed(change: Change) -> bool:
    # Data may have become more since: the run has read their beginning. Nothing is said of what is
    # not there any more.
    is_data = change.field.startswith("data.")
    return change.verdict == "missing" or (is_data and change.verdict in ("grown", "new"))


def _list_files(config: Config, known: Mapping[str, Any]) -> tuple[Files, list[str]]:
    """Return the files of each field of inputs.json as they are now, and what there is no trace of.

    The policy of a task that works on a checkpoint is the one file of its record; that of
    `eval.against=sft` lies where the task has found it.
    """
    files: dict[str, list[tuple[str, Path]]] = {}
    lacking: list[str] = []
    try:
        files |= list_inputs(source.use_final(config))
    except UserError as error:
        lacking.append(str(error))
        files |= {field: named for field, named in list_inputs(config).items() if named}
    files |= list_code(config)
    for field, entries in known.items():
        is_record = [one["name"] for one in entries] == [""]
        if (is_record or field == "eval.against") and not files.get(field):
            named = [(one["name"], Path(one["path"])) for one in entries]
            files[field] = [(name, path) for name, path in named if path.is_file()]
    lost = [field for field in known if field not in files]
    return files, lacking + [f"{field}: its files are not found" for field in lost]
