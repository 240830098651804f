"""The processes of one job: how they act, decide and fail together."""

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from halos_jax import sharding
from halos_jax.errors import UserError

_Result = TypeVar("_Result")

# Parts of the messages with which jax reports that another process is gone.
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
_PATIENCE = 10.0  # seconds within which all processes fail if they fail for the same reason


class OtherProcessError(UserError, RuntimeError):
    """Another process of the job has failed; its own log says why."""


def run_on_first(action: Callable[[], _Result]) -> _Result | None:
    """Run `action` on the first process while the others wait; return its result, None on others.

    Raises:
      UserError: the error of the action; on the other processes an OtherProcessError.
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


def run_on_all(action: Callable[[], _Result], *kinds: type[UserError]) -> _Result:
    """Run `action` on every process and return its result; if it fails on one, fail on all.

    All processes call this, for work that each does by itself and that may fail on some of them.
    So none waits for another that has given up, and all raise the same error. `action` itself must
    not wait for other processes.

    Raises:
      as `fail_together`.
    """
    try:
        result = action()
    except Exception as error:
        fail_together(error, *kinds)
        raise
    fail_together(None, *kinds)
    return result


def fail_together(error: Exception | None, *kinds: type[UserError]) -> None:
    """Raise an error on all processes of the job if any of them calls this with one.

    All processes call this, with None if they have no error.

    Args:
      kinds: types of errors that every process can raise, the worst last. An error of another type
        is worse than these, and is raised only on the process where it happened.

    Raises:
      The worst error; if several are equally bad, that of the first such process. For an error not
      of `kinds`, the other processes raise an OtherProcessError.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    rank = 0
    if error is not None:
        rank = kinds.index(type(error)) + 1 if type(error) in kinds else len(kinds) + 1
    ranks = np.asarray(multihost_utils.process_allgather(np.int32(rank))).reshape(-1)
    worst, first = int(ranks.max()), int(ranks.argmax())
    if worst == 0:
        return
    if worst <= len(kinds):
        message = take_text(str(error), first)
        raise kinds[worst - 1](message) from error
    if error is not None and rank == worst:
        raise error
    raise OtherProcessError(f"process {first} of the job has stopped; its log says why")


def take_text(text: str, process: int = 0) -> str:
    """Return, on all processes, the text that `process` passes; all of them must call this."""
    if jax.process_count() == 1:
        return text
    # The name of a file in it may be no UTF-8; one that fails here would leave the others waiting.
    data = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros([max(int(sizes.max()), 1)], np.uint8)
    padded[: data.size] = data
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return gathered[process, : sizes[process]].tobytes().decode()


def decide_on_first(action: Callable[[], Any], *kinds: type[UserError]) -> Any:
    """Return, on all processes, the JSON value that `action` returns on the first one.

    All processes call this, and `action` runs on each, so that a failure on any is noticed.

    Raises:
      as `run_on_all`.
    """
    return json.loads(take_text(json.dumps(run_on_all(action, *kinds))))


def leave(seconds: float = _PATIENCE) -> bool:
    """Shut down together with the other processes of the job; tell whether they came in time.

    A process that fails calls this. If the others have not come in time, they are at work and will
    not come, so this process should exit without them, at once.
    """
    if not jax.distributed.is_initialized():
        return True
    thread = threading.Thread(target=jax.distributed.shutdown, name="leave", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def explain_loss(error: BaseException) -> str | None:
    """Return a message if an error means that another process was lost; else None."""
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
