"""Files on disk: written whole or not at all, with errors that say what to do."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

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


# Error codes that mean a full or broken disk, whatever was being written.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STORAGE_ERRORS = (*_FULL, errno.EROFS, errno.EFBIG, errno.EIO)


# Called with the path, the size and the SHA-256 of a file that is about to take its name.
Note = Callable[[Path, int, str], None]


class WorkdirError(UserError, RuntimeError):
    """The workdir cannot be used: it is unwritable, full, locked, or of another configuration."""


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

    An error is about the workdir if it names a path inside it, or says that a disk is full or
    broken, since a failed write to an open file names no path. All others, such as those of a
    user's reward function, pass through.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and _is_inside(error.filename, workdir)
        if inside or error.errno in _STORAGE_ERRORS:
            raise _explain(error, workdir) from error
        raise


def _is_inside(path: object, folder: str | Path) -> bool:
    if not isinstance(path, (str, os.PathLike)):
        return False  # a file descriptor, or bytes
    return Path(path).absolute().is_relative_to(Path(folder).absolute())


def _explain(error: OSError, path: str | Path) -> WorkdirError:
    where = error.filename or path
    advice = _ADVICE.get(error.errno or 0, "check the disk, or choose another folder")
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        reason += f" ({describe_free(path)})"
    elif error.errno == errno.ENOENT and _has_parent(where):
        reason = "it cannot be created here"
        advice = "the file system takes no new files, as /proc; choose another folder"
    return WorkdirError(
        f"workdir: cannot use {str(where)!r}: {reason}; {advice} (--config.workdir=DIR)"
    )


def _has_parent(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and Path(path).absolute().parent.exists()


def says_full(error: BaseException) -> bool:
    """Tell whether an error, or one that caused it, says that a disk is full.

    C++ libraries give the system's error as text, without its code.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if any(os.strerror(code) in str(cause) for code in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def describe_free(path: str | Path) -> str:
    """Return "0.2 GiB free" for the disk that holds `path` or its nearest existing ancestor."""
    return f"{format_size(_measure_free(path))} free"


def describe_full(folder: str | Path, size: int, kept: str) -> str:
    """Return the message for a disk that became full while a checkpoint was written.

    Args:
      size: bytes of the checkpoint.
      kept: what is safe, such as "checkpoint 7".
    """
    return (
        f"the disk of {str(folder)!r} is full: {describe_free(folder)}, a checkpoint takes "
        f"{format_size(size)} and stands beside the old one until it is whole; free some space "
        f"and run the same command again ({kept} is safe)"
    )


def require_space(folder: str | Path, size: int, what: str) -> None:
    """Raise WorkdirError if the disk of `folder` has no room for `size` bytes.

    Args:
      what: what needs them, such as "a checkpoint".
    """
    free = _measure_free(folder)
    if free < size:
        raise WorkdirError(
            f"workdir: the disk of {str(folder)!r} has {format_size(free)} free, but {what} takes "
            f"{format_size(size)}; free some space, or choose another folder (--config.workdir=DIR)"
        )


def format_size(size: int) -> str:
    """Return a number of bytes in readable form: "5.9 GiB"."""
    left = float(size)
    for unit in ("B", "KiB", "MiB"):
        if left < 1024:
            return f"{left:.0f} B" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1024
    return f"{left:,.1f} GiB"


def _measure_free(path: str | Path) -> int:
    path = Path(path).absolute()
    present = next(one for one in (path, *path.parents) if one.exists())
    return shutil.disk_usage(present).free


def remove_partials(folder: str | Path) -> None:
    """Delete the `*.partial` files and folders that a killed writer left in `folder`."""
    for path in sorted(Path(folder).glob("*.partial")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # an export that was cut short
        else:
            path.unlink()


def write_json_atomic(path: str | Path, obj: object, *, note: Note | None = None) -> None:
    """Replace `path` with `obj` as JSON; see `write_bytes_atomic`."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8"), note=note)


def write_bytes_atomic(path: str | Path, data: bytes, *, note: Note | None = None) -> None:
    """Replace `path` with `data`, creating its folder if needed; see `replace_file`.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path, note=note) as file:
            file.write(data)


class NewFile:
    """A file that is being written, with the size and the SHA-256 of its contents so far."""

    def __init__(self, stream: BinaryIO) -> None:
        self.size = 0
        self._stream, self._sha256 = stream, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.size += len(data)
        self._sha256.update(data)


@contextlib.contextmanager
def replace_file(path: str | Path, *, note: Note | None = None) -> Iterator[NewFile]:
    """Yield a file that replaces `path` at the end, so that `path` is always the old or the new.

    It is written as `path.partial` and synced; then `note` is called and the file is renamed. If
    the body fails, `path` stays as it was.

    Raises:
      OSError: if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            file = NewFile(stream)
            yield file
            stream.flush()
            os.fsync(stream.fileno())
        if note is not None:
            note(path, file.size, file.sha256)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def open_append(path: str | Path, *, sync: bool = True) -> Iterator[int]:
    """Yield a file descriptor that appends to `path`; at the end, the data is synced to disk.

    With `sync=False` that is the caller's to do. The name of a new file is synced in any case.
    """
    path = Path(path)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        yield descriptor
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)


def append_whole(path: str | Path, data: bytes) -> None:
    """Append all of `data`, or nothing, to a file that no other process writes to.

    Raises:
      OSError: if it cannot be written whole.
    """
    with open_append(path, sync=False) as descriptor:
        start = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)  # half a line would spoil the next one
            raise


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


def sync_tree(folder: Path) -> None:
    """Sync everything in `folder` to disk: all files, and the names in all folders."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink() and path != folder:  # a name in its folder; it may lead nowhere
            continue
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


def sync_file(path: str | Path) -> None:
    """Sync the contents of a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: str | Path) -> None:
    """Sync the names in `folder` to disk: a rename is durable only once its folder is synced."""
    try:
        sync_file(folder)
    except OSError as error:
        # Some network file systems cannot sync folders; there, durability is up to them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
