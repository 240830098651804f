"""Settings and fixtures of all tests: eight CPU devices, no network, meshes."""

import os
import shutil
import signal
import tempfile

# Before jax is imported: the devices are fixed when it starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: spare XLA the optimisations that take longest.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# XLA's threads, as many as there are cores by default. A collective of virtual devices occupies one
# for each device until all have come: where two that do not depend on each other start at once, too
# few threads would wait for ever.
os.environ.setdefault("NPROC", "64")
# No test reads the network; a hub id is an error at once instead of after a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Killed and resumed runs compile the same programs again and again, in processes of their own: all
# of a session, this one's workers too, share what they compile.
_CACHE = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="halos_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import MeshConfig


def pytest_unconfigure():
    """Remove the compiled programs, in the process that has made their folder."""
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture
def mesh():
    """Yield the mesh of all eight devices, each axis of size 2, and make it the current one."""
    made = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(made):
        yield made


@pytest.fixture
def mesh1():
    """Return a mesh of one device (not made the current one)."""
    return jax.make_mesh(
        (1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
        devices=jax.devices()[:1],
    )


@pytest.fixture
def default_signals():
    """Let Ctrl-C and SIGHUP act as in a terminal, for this process and those that it starts.

    Whoever runs the tests may ignore them (`nohup`, a script's background job).
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
