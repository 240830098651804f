"""The devices of a job: finding them, joining other processes, explaining a lack of memory."""

import contextlib
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from importlib import util
from typing import Literal

import jax

from halos_jax.config import Config, schema
from halos_jax.errors import UserError

logger = logging.getLogger(__name__)

# Flags by which XLA adds up in an order that is always the same, on a GPU.
_DETERMINISTIC = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_PATIENCE = 300.0  # seconds to wait for the first process to listen, as long as jax itself waits
# Package -> the platform that it supports.
_PLUGINS = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13", "libtpu": "tpu"}
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# Device kind -> operations a second of a dense 16-bit matmul, as its vendor's data sheet says.
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

Work = Literal["load", "sample", "score", "train", "signs", "rescore"]

# Kind of work -> settings that need less memory: field -> the value to set; None: lower it.
_LESS: dict[str, dict[str, str | None]] = {
    "load": {"model.params_dtype": "bfloat16", "lora.base": "int8"},
    "sample": {"sampling.slots": None, "sampling.max_tokens": None},
    "score": {"train.tokens_per_device": None, "reward.compute_dtype": "bfloat16"},
    "train": {
        "train.tokens_per_device": None,
        "model.remat": "full",
        "optimizer.moments_dtype": "bfloat16",
    },
    "signs": {"train.tokens_per_device": None, "rounds.watch_samples": "0"},
    "rescore": {"train.tokens_per_device": None, "rounds.rescore_samples": "0"},
}


class DeviceError(UserError, RuntimeError):
    """A device or another process of the job is missing, or a device is out of memory."""


def join_processes() -> None:
    """Join the other processes of the job, found from the cluster or three environment variables.

    A process that has joined them already, in an earlier run, stays joined.

    Raises:
      DeviceError: if neither tells which processes there are, or the first one does not listen.
    """
    if jax.distributed.is_initialized():
        return
    # jax finds the processes by itself on TPU VMs, SLURM and GKE; elsewhere it needs the variables.
    given = {name: os.environ.get(name, "") for name in _VARIABLES}
    address = given["JAX_COORDINATOR_ADDRESS"]
    count, number = (_read_count(name, given[name]) for name in _VARIABLES[1:])
    if address:
        _check_address(address)
        if not number:  # process 0 speaks for all
            logger.info("waiting for all of %s processes at %s", count or "the", address)
    if address and number:
        # If nothing listened there, jax would end the program with a page of C++ frames.
        _wait_for(address, _PATIENCE)
    try:
        jax.distributed.initialize(address or None, num_processes=count, process_id=number)
    except (ValueError, IndexError) as error:
        raise DeviceError(
            f"mesh.distributed: no TPU pod, SLURM or GKE was found, and {', '.join(_VARIABLES)} "
            f"are {', '.join(repr(value) for value in given.values())} ({error}); set them to "
            "HOST:PORT of the first process, the number of processes and the number of this one, "
            "from 0; or --config.mesh.distributed=false for one process"
        ) from error


def find_devices() -> str:
    """Return the platform of this job's devices; this initialises jax.

    Raises:
      DeviceError: if the platform that was asked for is not available.
    """
    # jax adds its options at import, where the type checker cannot see them.
    asked = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(name for package, name in _PLUGINS.items() if util.find_spec(package))]
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise DeviceError(
            f"no device: JAX_PLATFORMS={asked!r}, but this installation has {', '.join(there)}"
            f"{f' ({reason})' if reason else ''}; install what is missing, as in pip install -e "
            "'.[cuda13]' (or cuda12, tpu), or unset the variable"
        ) from error
    first = asked.partition(",")[0]
    if first and not (found == first or (found == "gpu" and first in ("cuda", "rocm"))):
        logger.warning("JAX_PLATFORMS=%r, but the devices found are of %r", asked, found)
    return found


def find_peak_flops(kind: str) -> float | None:
    """Return the 16-bit operations a second that a kind of device can do; None: not known."""
    return _PEAKS.get(kind)


@contextlib.contextmanager
def explain_memory(work: Work, what: str, config: Config) -> Iterator[None]:
    """Turn an out-of-memory error of a device, anywhere inside the block, into a DeviceError.

    Args:
      work: the kind of work, which decides what settings the message suggests.
      what: the work in words, such as "training of round 3".
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DeviceError(
            f"out of device memory in {what}{_describe_wanted(str(error))}; "
            f"{_list_savings(work, config)}; what is done is kept: the same command with these "
            "settings goes on from there"
        ) from error


def _describe_wanted(text: str) -> str:
    """Return how much memory was wanted, as far as the error says, to be put after the work."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 0)
    of_all = f" of {_format_bytes(limit)} a device" if limit else ""
    # Two spellings: "allocate 16777216 bytes" and "allocate 16.00MiB".
    wanted = re.search(r"allocat\w* ([\d.]+) ?(bytes|[KMGT]iB)", text)
    if wanted:
        size = float(wanted[1]) * _UNITS[wanted[2]]
        return f" ({_format_bytes(size)} more wanted{of_all})"
    message = " ".join(text.partition("RESOURCE_EXHAUSTED:")[2].split())
    return f" ({message[:160]}{of_all})" if message else of_all


def _format_bytes(size: float) -> str:
    for unit in ("GiB", "MiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size / _UNITS['KiB']:.0f} KiB"


def _list_savings(work: Work, config: Config) -> str:
    values = dict(schema.flatten(schema.to_plain(config)))
    lines = []
    for path, value in _LESS[work].items():
        if path == "lora.base" and not config.lora.rank:
            continue
        if value is None:
            lines.append(f"lower {path} (now {values[path]})")
        elif str(values[path]) != value:
            lines.append(f"set {path}={value} (now {values[path]})")
    lines.append(f"take more devices with mesh.fsdp (now {values['mesh.fsdp']})")
    return ", or ".join(lines)


def _read_count(name: str, text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal():
        raise DeviceError(f"mesh.distributed: {name}: got {text!r}, allowed: a whole number")
    return int(text)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeviceError(
            f"mesh.distributed: JAX_COORDINATOR_ADDRESS: got {address!r}, allowed: HOST:PORT of "
            "the job's first process"
        )


def _wait_for(address: str, patience: float) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"mesh.distributed: nothing listens at JAX_COORDINATOR_ADDRESS={address} "
                    f"after {patience:.0f} seconds ({error}); start the job's first process, "
                    "JAX_PROCESS_ID=0, there"
                ) from error
        time.sleep(0.2)


def is_deterministic() -> bool:
    """Tell whether XLA_FLAGS make a GPU add up in an order that is always the same."""
    flags = shlex.split(os.environ.get("XLA_FLAGS", ""))
    values = dict(flag.partition("=")[::2] for flag in flags)
    return any(values.get(name, "false").lower() in ("", "1", "true") for name in _DETERMINISTIC)
