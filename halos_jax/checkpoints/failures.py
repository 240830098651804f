"""What is wrong with a checkpoint, and what a user can do about it."""

from collections.abc import Sequence
from pathlib import Path

from halos_jax import storage
from halos_jax.checkpoints.shelf import Shelf
from halos_jax.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, incomplete, unreadable or has a different structure."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; an earlier one may be intact."""


def explain_damage(shelf: Shelf, save_id: int, reason: str) -> DamagedError:
    """Return the error for a checkpoint that is not as it was written; `reason` says why."""
    others = [f"{other:08d}" for other in shelf.ids() if other != save_id]
    left = f"there are others: {', '.join(others)}" if others else "no other one is left"
    return DamagedError(
        f"{shelf.path(save_id)} is incomplete or corrupt ({shorten(reason)}); {left}; "
        "put its files back, or start a new run with --config.workdir=DIR"
    )


def explain_mismatch(path: Path, wrong: Sequence[str]) -> CheckpointError:
    """Return the error for a checkpoint with other arrays than the run; `wrong` lists them."""
    listed = "\n".join(f"  - {line}" for line in wrong)
    return CheckpointError(
        f"{path} does not fit this run: {len(wrong)} array(s) differ:\n{listed}\n"
        "use the model and optimizer that wrote it, or another workdir"
    )


def explain_write(shelf: Shelf, save_id: int, error: Exception, *, size: int) -> CheckpointError:
    """Return the error for a checkpoint of `size` bytes that could not be written."""
    if storage.says_full(error):
        ids = shelf.ids()
        kept = f"checkpoint {ids[-1]:08d}" if ids else "what is done"
        return CheckpointError(storage.describe_full(shelf.folder, size, kept))
    reason = shorten(f"{type(error).__name__}: {error}")
    return CheckpointError(
        f"{shelf.path(save_id)} could not be written ({reason}); "
        "the checkpoints before it are kept; check the disk and run the same command again"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that the host or a device has no memory left."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def shorten(text: str) -> str:
    """Return a reason on one line of at most 405 characters."""
    text = " ".join(text.split())
    # The reason comes last, after paths that may be long.
    return text if len(text) <= 400 else f"{text[:100]} ... {text[-300:]}"
