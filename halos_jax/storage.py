"""What a run needs of a disk: errors that say what to do, and files that are whole or absent."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halos_jax.errors import UserError

_ADVICE = {
    errno.EACCES: "give yourself write permission, or choose another folder",
    errno.EPERM: "give yourself write permission, or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the limit on the size of a file is reached (ulimit -f); raise it and run the "
    "same command again",
    errno.EIO: "the disk failed; check it and run the same command again",
    errno.ENOTDIR: "a file stands where a folder is needed; move it, or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; move it, or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; move it away",
    errno.ENOENT: "the folder is missing; create it, or choose another one",
}


# What says that a disk is full or broken, whatever was being written.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


# Called with the path, the size and the SHA-256 of a file that is about to take its name.
Note = Callable[[Path, int, str], None]


class WorkdirError(UserError, RuntimeError):
    """The workdir cannot be used: unwritable, full, locked, or of another configuration."""


@contextlib.contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into a WorkdirError with the path and what to do."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


@contextlib.contextmanager
def explain_run_errors(workdir: str | Path) -> Iterator[None]:
    """Turn an OSError about the workdir, from anywhere inside the block, into a WorkdirError.

    About the workdir is what names a path inside it and what says that a disk is full or broken:
    a write to an open file names no path. Other errors, those of a user's reward function say,
    pass through.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and _is_inside(error.filename, workdir)
        if inside or error.errno in _STORAGE_ERRORS:
            raise _explain(error, workdir) from error
        raise


def _is_inside(path: Any, folder: str | Path) -> bool:
    if not isinstance(path, (str, os.PathLike)):
        return False  # a descriptor, or bytes
    return Path(path).absolute().is_relative_to(Path(folder).absolute())


def _explain(error: OSError, path: str | Path) -> WorkdirError:
    where = error.filename or path
    advice = _ADVICE.get(error.errno, "check the disk, or choose another folder")
    reason = error.strerror or str(error)
    return WorkdirError(
        f"workdir: cannot use {str(where)!r}: {reason}; {advice} (--config.workdir=DIR)"
    )


def remove_partials(folder: str | Path) -> None:
    """Delete the `*.partial` files and folders that a killed writer left in `folder`."""
    for path in sorted(Path(folder).glob("*.partial")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # an export that was cut short
        else:
            path.unlink()


def write_json_atomic(path: str | Path, obj: Any, *, note: Note | None = None) -> None:
    """Replace `path` with `obj` as JSON; as `write_bytes_atomic`."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8"), note=note)


def write_bytes_atomic(path: str | Path, data: bytes, *, note: Note | None = None) -> None:
    """Replace `path` with `data` so that readers, and a crash, see the old or the new.

    `note` is called when all but the renaming is done.

    Raises:
      WorkdirError: where the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if note is not None:
            note(path, len(data), hashlib.sha256(data).hexdigest())
        os.replace(partial, path)
        sync_folder(path.parent)


def hash_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_start(path: str | Path, size: int) -> str:
    """Return the hex SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
