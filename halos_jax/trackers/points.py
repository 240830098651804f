"""What a tracker gets: the session that it is opened for, and one point after the other."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Samples:
    """A table of held-out samples: the names of its columns, and its rows of texts and numbers."""

    columns: tuple[str, ...]
    rows: tuple[Sequence[str | float | None], ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """A line of metrics.jsonl.

    Attributes:
      number: its place in the file, from 0. The same for every resume of a run; several points may
        have the same step.
      step: the optimizer step.
      wall_time: when it was taken, in seconds since 1970; NaN in files that do not say.
      values: the metrics under their names in the file; they may be NaN.
      samples: held-out samples of the round that the point evaluates.
    """

    number: int
    step: int
    wall_time: float
    values: Mapping[str, float]
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """What a tracker may need to know about the run that it is opened for.

    Attributes:
      folder: a folder of the workdir for the files of trackers; it may not exist yet.
      project: the name of the project.
      run: the name of the run.
      id: an identifier of the run, the same in all of its sessions.
      offline: whether nothing may be sent over the network.
      config: the run's config as nested dicts.
      sent: how many points earlier sessions have handed over for certain.
    """

    folder: Path
    project: str
    run: str
    id: str
    offline: bool
    config: Mapping[str, Any]
    sent: int


class Tracker(Protocol):
    """A service that follows a run; it is made by calling its class with a `Session`.

    All of it is called in a thread of its own. An error ends the tracker, and not the run.
    """

    known: int
    """How many points of the run the service has already; these are not logged again. 0 if it is
    made anew by each session, `session.sent` if the service cannot tell."""

    def log(self, point: Point) -> None:
        """Log a point; points come in the order of their numbers."""

    def close(self) -> None:
        """Wait until all points have reached the service, and close it."""
