"""A tracker kept up to date with metrics.jsonl by a thread: a sink that never holds up the run.

The file is what the tracker gets, line by line. So it has the points that the file has: a resumed
run first cuts the file back to its checkpoint, and lines that the tracker knows are passed over.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from halos_jax.metrics import WALL_TIME, Record
from halos_jax.trackers.points import Point, Samples, Tracker

logger = logging.getLogger(__name__)

_PAUSE = 0.5  # seconds between two looks at the file
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker


class Follower:
    """Hands the lines of a metrics file to a tracker; see `halos_jax.metrics.Sink`."""

    def __init__(
        self,
        name: str,
        path: Path,
        open_tracker: Callable[[], Tracker],
        read_samples: Callable[[Point], Samples | None] = lambda point: None,
        note_sent: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Prepare to follow `path`; `resume` begins.

        Args:
          name: the tracker's, for messages.
          open_tracker: opens it, and may take its time.
          read_samples: returns the table of samples that belongs to a point.
          note_sent: is called with the number of points that have been handed over.
        """
        self._name, self._path, self._open = name, path, open_tracker
        self._read_samples, self._note_sent = read_samples, note_sent
        self._number, self._offset = 0, 0
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def resume(self, step: int | None) -> Sequence[Record]:
        """Begin to follow the file, which holds the records up to `step` alone by now."""
        self._news.set()
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()
        return ()

    def write(self, record: Record) -> None:
        """Note that the file has a new line."""
        self._news.set()

    def flush(self) -> None:
        """Do nothing: what the tracker lacks after a crash it gets from the file."""

    def close(self) -> None:
        """Wait until the tracker has everything, but not longer than `PATIENCE`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        self._news.set()
        thread.join(PATIENCE)
        if thread.is_alive():
            logger.warning(
                "%s has not taken all metrics within %.0f s; the same command, run again, sends "
                "the rest; %s has all of them",
                self._name,
                PATIENCE,
                self._path,
            )

    def _work(self) -> None:
        try:
            self._follow()
        except (Exception, SystemExit) as error:  # whatever it is, it must not stop the run
            logger.warning(
                "%s gets no more metrics (%s: %s); the run goes on, and %s has all of them; when "
                "the command is run again, %s gets what it lacks; "
                "--config.trackers.names leaves it out",
                self._name,
                type(error).__name__,
                error,
                self._path,
                self._name,
            )

    def _follow(self) -> None:
        tracker = self._open()
        try:
            is_last = False
            while not is_last:
                self._news.wait()
                is_last = self._closing.is_set()  # before the look: a line may follow it
                self._news.clear()
                self._hand_over(tracker)
                self._closing.wait(_PAUSE)
        finally:
            tracker.close()

    def _hand_over(self, tracker: Tracker) -> None:
        before = self._number
        for point in self._read_points():
            if point.number >= tracker.known:
                samples = self._read_samples(point)
                tracker.log(Point(**{**vars(point), "samples": samples}))
            self._number = point.number + 1
        if self._number > before:
            self._note_sent(self._number)

    def _read_points(self) -> Iterator[Point]:
        """Yield the points of the whole lines that are new in the file."""
        if not self._path.exists():
            return
        number = self._number
        with open(self._path, "rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                yield _make_point(number, line)
                number, self._offset = number + 1, self._offset + len(line)


def _make_point(number: int, line: bytes) -> Point:
    values = {name: math.nan if v is None else v for name, v in json.loads(line).items()}
    step, wall_time = int(values.pop("step")), values.pop(WALL_TIME, math.nan)
    return Point(number, step, wall_time, values)
