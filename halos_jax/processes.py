"""Several processes of one job: what the first does for all, and how they leave."""

import threading
from collections.abc import Callable
from typing import TypeVar

import jax

from halos_jax import sharding
from halos_jax.errors import UserError

_Result = TypeVar("_Result")

# Of the errors with which jax says that another process is not there any more.
_LOST = (
    "Gloo",
    "coordination service",
    "CoordinationService",
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "remote process exited",
    "NCCL",
)
_PATIENCE = 10.0  # seconds in which processes that fail for one reason all do


class OtherProcessError(UserError, RuntimeError):
    """Another process of the job has failed, and has said why in its own log."""


def run_on_first(action: Callable[[], _Result]) -> _Result | None:
    """Return what `action` gives on the first process, None on the others, which wait for it.

    Raises:
      UserError: of the action; on the other processes an OtherProcessError.
    """
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as found:
            error = found
    failed = sharding.take_from_first(error is not None)
    if error is not None:
        raise error
    if failed:
        raise OtherProcessError("process 0 of the job has stopped; its log says why")
    return result


def leave(seconds: float = _PATIENCE) -> bool:
    """Leave the job together with its other processes; tell whether they came in time.

    To be called by a process that fails. Where the others do not come, they are at work and will
    not come: this one should go without them, at once.
    """
    if not jax.distributed.is_initialized():
        return True
    thread = threading.Thread(target=jax.distributed.shutdown, name="leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def explain_loss(error: BaseException) -> str | None:
    """Return the line that says that another process was lost, if that is what an error means."""
    if not jax.distributed.is_initialized() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    text = " ".join(str(error).split())
    if not any(sign in text for sign in _LOST):
        return None
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return (
        f"OtherProcessError: process {jax.process_index()} has lost another process of the job, "
        f"whose log says why it has ended ({shown}); run the same command again on all of them to "
        "carry on"
    )
