"""The page of a run under way: written in the background, never in the way of the run."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from halos_jax.report.page import describe_run, render, write_page
from halos_jax.report.recorded import METRICS, read_run
from halos_jax.workdir.intact import PAGE
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)


def write_report(workdir: str | Path, path: str | Path | None = None) -> Path:
    """Write the page about the run in `workdir`, by default as its report.html; return its path.

    Raises:
      ConfigError: if there is no run in the folder.
      OSError: if the page cannot be written.
    """
    target = Path(path or Path(workdir) / PAGE)
    write_page(render(describe_run(read_run(Path(workdir)))), target)
    return target


class Reporter:
    """Writes the page of a run again and again, in a thread of its own.

    An update while the page is being written is made when that is done, several of them once. An
    error is logged once, and the run goes on. A process that ends at once, without `close`, leaves
    the page as it was.
    """

    def __init__(self, write: Callable[[], object] | None) -> None:
        """Make a reporter that calls `write` for each update; None: it does nothing."""
        self._write = write
        self._wanted, self._is_closing = threading.Event(), False
        self._has_failed, self._asked = False, time.monotonic()
        self._thread: threading.Thread | None = None

    @property
    def has_written(self) -> bool:
        """Whether the page has been written, and never failed to be."""
        return self._thread is not None and not self._has_failed

    def update(self, every: float = 0.0) -> None:
        """Have the page written soon, but not within `every` seconds of last time."""
        now = time.monotonic()
        if self._write is None or (every and now - self._asked < every):
            return
        self._asked = now
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="report", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait until the page is as the last update wants it."""
        self._is_closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wanted.wait()
            self._wanted.clear()
            # After the flag is taken down: a close that comes in between is seen here, one that
            # comes later raises the flag again.
            is_last = self._is_closing
            self._write_once()

    def _write_once(self) -> None:
        started = time.perf_counter()
        try:
            if self._write is not None:
                self._write()
        except Exception as error:  # whatever it is, it must not stop the run
            if not self._has_failed:
                self._has_failed = True
                logger.warning(
                    "%s could not be written (%s: %s); the run goes on; --config.mode=report "
                    "writes it later, --config.report.enabled=false leaves it out",
                    PAGE,
                    type(error).__name__,
                    error,
                )
        logger.debug("%s took %.2f s", PAGE, time.perf_counter() - started)


@contextmanager
def report_on(workspace: Workspace) -> Iterator[Reporter]:
    """Yield the reporter of an open workdir's page; at the end, even an early one, it is written.

    It does nothing where the page is switched off, and on processes other than 0.
    """
    is_on = workspace.config.report.enabled and workspace.is_writer
    reporter = Reporter((lambda: write_report(workspace.workdir)) if is_on else None)
    try:
        yield reporter
        reporter.update()
    except BaseException:
        if (workspace.workdir / METRICS).exists():  # what came before the error is worth a look
            reporter.update()
        raise
    finally:
        reporter.close()
        if reporter.has_written:
            logger.info("the page about it is %s", workspace.workdir / PAGE)
