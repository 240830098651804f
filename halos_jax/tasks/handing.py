"""What is done with the model that a task has exported: its card, and the push to the Hub."""

import logging
from collections.abc import Mapping
from pathlib import Path

from halos_jax import storage
from halos_jax.models.files.peft import CONFIG
from halos_jax.policies import hub
from halos_jax.policies.final import ADAPTER, report_other_dtype
from halos_jax.report import card
from halos_jax.report.recorded import Recorded, read_run
from halos_jax.workdir.intact import FINAL
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)


def hand_on(
    workspace: Workspace, folder: Path | None = None, *, of: Path | None = None, what: str = ""
) -> None:
    """Write the model card of an export, and push it if the config says so; process 0 does.

    Call it after the export, and again when a complete run is started: what was done is not done
    again. Neither a card that cannot be written nor a push that fails is an error of the run.

    Args:
      folder: the export; None: `final/` in the workdir.
      of: the workdir of the run whose policy it is; None: this one.
      what: which policy of that run it is, in a sentence; "": the one at its end.
    """
    folder = folder or workspace.workdir / FINAL
    if not workspace.is_writer or not folder.is_dir():
        return
    settings = workspace.config.export
    try:
        run = read_run(of or workspace.workdir)
        for path, text in _make_cards(run, folder, settings.license, what).items():
            _write(path, text)
    except Exception as error:  # whatever it is, the model is complete
        logger.warning(
            "%s: the model card could not be written (%s: %s); the model is complete, and the same "
            "command, run again, tries it again",
            folder,
            type(error).__name__,
            error,
        )
    hub.push(folder, settings)


def hand_on_again(workspace: Workspace) -> None:
    """Do for a complete run what `hand_on` may have left, and say what no longer has an effect."""
    if workspace.is_writer:
        report_other_dtype(workspace.config.export.dtype, workspace.workdir / FINAL)
    hand_on(workspace)


def _make_cards(run: Recorded, folder: Path, license: str, what: str) -> Mapping[Path, str]:
    made = {folder / card.FILE: card.make_card(run, folder, license=license, what=what)}
    if (folder / ADAPTER / CONFIG).is_file():
        made[folder / ADAPTER / card.FILE] = card.make_adapter_card(run, license=license)
    return made


def _write(path: Path, text: str) -> None:
    """Write a card, unless somebody has edited the one that is there."""
    known = path.read_text("utf-8", errors="replace") if path.is_file() else None
    if known is not None and not card.is_own(known):
        logger.info("%s was edited, and stays as it is", path)
    elif known != text:
        storage.write_bytes_atomic(path, text.encode(errors="replace"))
