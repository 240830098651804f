"""The lock of a workdir: one job at a time; however its process ends, the lock is released."""

import fcntl
import logging
import os
import socket
from pathlib import Path

from halos_jax import storage

logger = logging.getLogger(__name__)


def lock_workdir(workdir: Path) -> int:
    """Lock a workdir; return a file descriptor that holds the lock until it is closed.

    Raises:
      WorkdirError: if another job holds the lock; the message names its process.
    """
    # Keep the file when the job ends: otherwise two jobs could lock two different files.
    lock = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise storage.WorkdirError(
            f"workdir: {workdir} is in use by another job (process {holder}); wait for it, stop "
            "it, or choose another folder with --config.workdir=DIR"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): start only one job in it", workdir, error)
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        os.close(lock)
        raise
    return lock
