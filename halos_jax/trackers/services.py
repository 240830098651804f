"""The ready trackers: TensorBoard, Weights & Biases, trackio. Their packages are optional."""

import importlib
import math
import os
import shutil
from typing import Any

from halos_jax.metrics import WALL_TIME
from halos_jax.trackers.points import Point, Samples, Session

TABLE = "held_out_samples"  # the name of the table of samples


class TensorBoard:
    """Event files in the workdir: `tensorboard --logdir WORKDIR/trackers/tensorboard`.

    Each session writes them anew from metrics.jsonl, so that they hold no point twice.
    """

    def __init__(self, session: Session) -> None:
        """Open the event files for all points."""
        self.known = 0
        folder = session.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        package = importlib.import_module("tensorboardX")
        # With purge_step a TensorBoard that has read the old files forgets their points.
        self._writer: Any = package.SummaryWriter(str(folder), purge_step=0, flush_secs=5)
        self._step, self._written = -1, set[tuple[str, float]]()

    def log(self, point: Point) -> None:
        """Write a scalar for each value, once if several points of a step have the same one."""
        if point.step != self._step:
            self._step, self._written = point.step, set()
        wall_time = None if math.isnan(point.wall_time) else point.wall_time
        for item in point.values.items():
            if item not in self._written:
                self._written.add(item)
                self._writer.add_scalar(*item, point.step, wall_time)
        if point.samples is not None:
            text = format_table(point.samples)
            self._writer.add_text(TABLE, text, point.step, wall_time)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the workdir's own id.

    A point's number is its step there, since several points of a run may have the same optimizer
    step; charts have the optimizer step ("step") as their x-axis. Online, the service says which
    points it has. Offline, each session writes the run anew, until it has been synchronised.
    """

    def __init__(self, session: Session) -> None:
        """Open or go on with the run."""
        wandb: Any = importlib.import_module("wandb")
        is_offline = session.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        is_new = is_offline and _remove_offline(session)
        session.folder.mkdir(parents=True, exist_ok=True)
        self._table = wandb.Table
        self._run = wandb.init(
            project=session.project,
            name=session.run,
            id=session.id,
            resume="allow",
            dir=str(session.folder),
            config=dict(session.config),
            mode="offline" if is_offline else None,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if is_offline:
            self.known = 0 if is_new else session.sent
        else:
            self.known = int(self._run.step)  # of the next point: those below have arrived

    def log(self, point: Point) -> None:
        """Log a point as a row of the history."""
        row: dict[str, Any] = {"step": point.step, WALL_TIME: point.wall_time, **point.values}
        if point.samples is not None:
            columns, rows = point.samples.columns, point.samples.rows
            row[TABLE] = self._table(columns=list(columns), data=[list(one) for one in rows])
        self._run.log(row, step=point.number, commit=True)

    def close(self) -> None:
        """Wait until all rows have been sent or written."""
        self._run.finish()


def is_logged_in() -> bool:
    """Tell whether Weights & Biases knows an account on this machine, or needs none."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return True
    wandb: Any = importlib.import_module("wandb")
    return bool(wandb.login(prompt=False, verify=False))


def _remove_offline(session: Session) -> bool:
    """Remove a run's offline files, unless some are on the service; tell whether all are gone."""
    folders = list((session.folder / "wandb").glob(f"offline-run-*-{session.id}"))
    if any(list(folder.glob("*.synced")) for folder in folders):
        return False
    for folder in folders:
        shutil.rmtree(folder)
    return True


class Trackio:
    """A run of trackio, in its local database or where TRACKIO_SPACE_ID says."""

    def __init__(self, session: Session) -> None:
        """Open or go on with the run, whose name ends in the workdir's own id."""
        self._package: Any = importlib.import_module("trackio")
        space = {"space_id": None} if session.offline else {}
        self._run = self._package.init(
            project=session.project,
            name=f"{session.run}-{session.id}",
            config=dict(session.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **space,
        )
        # Where the run goes on: the number of the first point that the database lacks.
        self.known = int(getattr(self._run, "_next_step", session.sent))

    def log(self, point: Point) -> None:
        """Log a point under its number; "step" is a name of trackio's own."""
        row: dict[str, Any] = {"optimizer_step": point.step, WALL_TIME: point.wall_time}
        row |= point.values
        if point.samples is not None:
            pandas = importlib.import_module("pandas")
            frame = pandas.DataFrame(list(point.samples.rows), columns=point.samples.columns)
            row[TABLE] = self._package.Table(dataframe=frame)
        self._run.log(row, step=point.number)

    def close(self) -> None:
        """Wait until all points are in the database."""
        self._run.finish()


def format_table(samples: Samples) -> str:
    """Return a table in Markdown whose texts are shown as they are: nothing in them is markup."""
    head = [list(samples.columns), ["---"] * len(samples.columns)]
    lines = [*head, *([_escape(cell) for cell in row] for row in samples.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str | float | None) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else f"{cell:.6g}"
    # As character references, which neither Markdown nor HTML takes for markup.
    marked = {ord(sign): f"&#{ord(sign)};" for sign in "&<>|\\`*_[]()#!~"}
    return cell.translate(marked).replace("\r", "").replace("\n", "<br>")
