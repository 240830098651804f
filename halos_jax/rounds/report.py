"""Reports of an online run for people: a line per round, and a table of all rounds."""

import logging
from pathlib import Path

from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.timing import format_times

logger = logging.getLogger(__name__)


def report_round(workdir: Path, manifest: Manifest, num_rounds: int) -> None:
    """Log the held-out metrics of a finished round, and how long its stages took."""
    metrics = {name: value for name, value in manifest.metrics.items() if "eval" in name}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    logger.info("round %d of %d done: %s", manifest.round, num_rounds, shown or "no evaluation")
    times = format_times(workdir, manifest.round)
    if times:
        logger.info("time of round %d: %s", manifest.round, times)


def format_rounds(workdir: Path) -> str:
    """Return a table of all rounds: prompts, examples, and every held-out metric."""
    rounds = range(last_round(workdir) + 1)
    found = [manifests.load_manifest(round_folder(workdir, round)) for round in rounds]
    done = [one for one in found if one is not None]
    names = [name for name in done[0].metrics if name.startswith(("reward_eval", "response"))]
    rows = [("round", "prompts", "examples", *names)]
    for manifest in done:
        counts = [manifest.metrics.get(f"feedback_{name}", 0) for name in ("pairs", "examples")]
        examples = sum(counts) if manifest.round else 0
        values = [f"{manifest.metrics[name]:.3f}" for name in names if name in manifest.metrics]
        rows.append(
            (str(manifest.round), str(manifest.stop - manifest.start), str(examples), *values)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def last_round(workdir: Path) -> int:
    """Return the number of the newest round in `workdir`."""
    names = [path.name for path in (workdir / "rounds").iterdir()]
    return max(int(name) for name in names if name.isdigit())  # skip files like .DS_Store
