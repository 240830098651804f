"""Several processes of one job: what they do and decide together, and how they leave."""

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


def run_on_all(action: Callable[[], _Result], *kinds: type[UserError]) -> _Result:
    """Return what `action` gives on every process; where it fails on one, it fails on all.

    To be called by all of them, for what each does by itself and one may fail at: no process then
    waits for another that has given up, and all go on from the same error. `action` must not wait
    for other processes itself.

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
    """Raise one error on all processes of the job, if one of them calls this with one.

    Args:
      kinds: errors that all raise alike, the worst last. Any other is worse, and is raised where
        it has happened.

    Raises:
      The worst error, and of several the one of the first process; in the place of one that is not
      of `kinds`, an OtherProcessError on the other processes.
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
    """Return the text with which `process` calls this on all processes, which all call it."""
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
    """Return the JSON value that `action` gives on the first process, on all of them.

    All call this, and `action` runs on each, so that one which cannot do it is heard of.

    Raises:
      as `run_on_all`.
    """
    return json.loads(take_text(json.dumps(run_on_all(action, *kinds))))


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
