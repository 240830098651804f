"""Folders of exported models: each appears whole or not at all, and only our own is ever removed.

Every folder has a file of ours, `MARK`, from its first moment on. A folder without one was made by
somebody else, whatever its name and contents.
"""

import contextlib
import ctypes
import fnmatch
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from halos_jax import sharding, storage
from halos_jax.models.hf.families import ModelError

logger = logging.getLogger(__name__)

MARK = "halos_jax.json"
# What readers of a model take from its folder, and of an adapter from `adapter/` in it. Any other
# file that was added, or lies deeper, is the user's own.
_READ = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
)
_FOLDERS = ("", "adapter/")


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place at the end.

    Everything is on disk, readable as the umask says, before the renaming. If the body fails,
    `folder` stays as it was and the new folder is removed; what a killed export has left is removed
    by the next one. Files of the user's own in `folder`, which no reader of models takes, are kept
    in the new folder. A link is followed. Only process 0 touches the disk; all processes leave
    together.

    Raises:
      ModelError: if something that no export made stands in the place.
    """
    folder = _follow_link(folder)
    partial, old = (folder.with_name(_make_name(folder, end)) for end in ("partial", "old"))
    if jax.process_index() == 0:
        _clean_up(folder)
        _refuse_others(folder)
        partial.mkdir(parents=True)
        write_json(partial / MARK, {"made_by": "halos_jax"})
    try:
        yield partial
        if jax.process_index() == 0:
            _open_to_readers(partial)
            _keep_users_files(folder, partial)
            storage.sync_tree(partial)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if jax.process_index() == 0:
        if folder.exists() and any(folder.iterdir()):
            logger.warning("%s: replacing the model that stood there", folder)
            if _exchange(partial, folder):
                partial.rename(old)
            else:
                folder.rename(old)
        if partial.exists():
            partial.rename(folder)
        storage.sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    sharding.wait_for_all(f"export {folder}")


def is_read(name: str) -> bool:
    """Tell whether a file of this name in a model's folder is one that readers of models take."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _READ)


def is_read_inside(name: str) -> bool:
    """Tell the same of a path inside of a model's folder, with its adapter."""
    folder, slash, file = name.rpartition("/")
    if folder + slash in ("additional_chat_templates/", "adapter/additional_chat_templates/"):
        return file.endswith(".jinja")
    return folder + slash in _FOLDERS and is_read(file)


def write_json(file: Path, value: object) -> None:
    """Write `value` as JSON whose bytes depend on nothing else."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _follow_link(folder: Path) -> Path:
    """Return the path that a link leads to, whether or not anything is there."""
    if not folder.is_symlink():
        return folder
    try:
        real = folder.resolve()
    except (OSError, RuntimeError):  # of a loop, by the version of Python
        real = folder
    if real.is_symlink():
        raise ModelError(
            f"{folder}: is a link that leads nowhere, so no model can be written there; give "
            "another folder, or mend the link"
        )
    return real


def _make_name(folder: Path, end: str) -> str:
    return f".{folder.name}.{secrets.token_hex(4)}.{end}"


def _find_own(folder: Path, end: str) -> list[Path]:
    """Return what exports to `folder` have left beside it under a name of `_make_name`."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.{end}")
    if not folder.parent.is_dir():
        return []
    found = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
    return [
        path
        for path in sorted(found)
        if path.is_dir() and ((path / MARK).is_file() or not any(path.iterdir()))
    ]


def _clean_up(folder: Path) -> None:
    """Put back or remove what a killed export to `folder` has left."""
    for old in _find_own(folder, "old"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)  # it was killed between the two renamings
    for partial in _find_own(folder, "partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder}: is a file; give a folder that is new, or move the file away")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ModelError(
            f"{folder}: holds files but no {MARK}, so no export of halos_jax made it and none "
            "replaces it; give another folder, or empty this one"
        )


def _keep_users_files(folder: Path, partial: Path) -> None:
    """Copy what somebody has put into an export to the one that takes its place."""
    kept = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder or is_read_inside(name) or (partial / name).exists():
            continue
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, partial / name, follow_symlinks=False)
        kept.append(name)
    if kept:
        listed = ", ".join(kept[:5]) + (" ..." if len(kept) > 5 else "")
        logger.info("%s: kept %d file(s) that no export has written: %s", folder, len(kept), listed)


def _open_to_readers(partial: Path) -> None:
    """Give all files the mode of the first, which is what the umask leaves; folders likewise."""
    file_mode, folder_mode = ((path).stat().st_mode & 0o777 for path in (partial / MARK, partial))
    for path in partial.rglob("*"):
        mode = folder_mode if path.is_dir() else file_mode
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one instant; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    names = (os.fsencode(path.absolute()) for path in (one, other))
    first, second = names
    return bool(libc.renameat2(here, first, here, second, exchange) == 0)
