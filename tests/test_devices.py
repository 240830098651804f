"""Devices that are not there, processes that do not join, memory that ends: one message each."""

import socket
import threading

import jax
import pytest

from halos_jax import devices
from halos_jax.config import Config, LoraConfig, ModelConfig, TrainConfig
from halos_jax.devices import DeviceError, explain_memory, find_devices, join_processes


@pytest.fixture
def asked():
    """Return a function that asks for platforms, as JAX_PLATFORMS does."""
    before = jax.config.jax_platforms
    yield lambda platforms: jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    "raised, expected",
    [
        (AssertionError(), "JAX_PLATFORMS='cuda', but this installation has cpu; install what is "
         "missing, as in pip install -e '.[cuda13]' (or cuda12, tpu), or unset the variable"),
        (RuntimeError("Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='' to "
                      "automatically choose an available backend)\nmore"),
         "but this installation has cpu (Unable to initialize backend 'tpu': no libtpu.so); inst"),
    ],
)  # fmt: skip
def test_a_platform_that_is_not_there_is_one_message(monkeypatch, asked, raised, expected):
    def fail():
        raise raised

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(devices.util, "find_spec", lambda name: None)
    asked("cuda")
    with pytest.raises(DeviceError) as caught:
        find_devices()
    message = str(caught.value)
    assert message.startswith("no device: JAX_PLATFORMS='cuda', ") and expected in message


def test_another_platform_than_the_first_is_said(asked, caplog):
    asked("cpu")
    assert find_devices() == "cpu" and not caplog.text
    asked("cuda,cpu")
    assert find_devices() == "cpu"
    assert "JAX_PLATFORMS='cuda,cpu', but the devices found are of 'cpu'" in caplog.text


def join(monkeypatch, address="", count="", number="", result=None):
    """Call `join_processes` with these variables; return what jax was called with."""
    calls = []
    for name, value in zip(devices._VARIABLES, (address, count, number), strict=True):
        monkeypatch.setenv(name, value)

    def initialize(*arguments, **options):
        calls.append((arguments, options))
        if result is not None:
            raise result

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    join_processes()
    return calls


def test_a_cluster_is_found_by_itself_or_said_by_variables(monkeypatch):
    assert join(monkeypatch) == [((None,), {"num_processes": None, "process_id": None})]
    expected = [(("a:1",), {"num_processes": 2, "process_id": 0})]
    assert join(monkeypatch, "a:1", "2", "0") == expected


def test_who_has_joined_does_not_join_again(monkeypatch):
    """A second run of the same process: jax would refuse it."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert join(monkeypatch, "a:1", "2", "0") == []


@pytest.mark.parametrize(
    "variables, result, expected",
    [
        ((), ValueError("coordinator_address should be defined."),
         "mesh.distributed: no TPU pod, SLURM or GKE was found, and JAX_COORDINATOR_ADDRESS, "
         "JAX_NUM_PROCESSES, JAX_PROCESS_ID are '', '', '' (coordinator_address should be defined.)"
         "; set them to HOST:PORT of the first process, the number of processes and the number of "
         "this one, from 0; or --config.mesh.distributed=false for one process"),
        (("a:1", "2", ""), ValueError("The process id must be defined."), "are 'a:1', '2', ''"),
        (("a:1", "two", "0"), None, "JAX_NUM_PROCESSES: got 'two', allowed: a whole number"),
        (("a:1", "2", "-1"), None, "JAX_PROCESS_ID: got '-1', allowed: a whole number"),
        (("a", "2", "0"), None, "JAX_COORDINATOR_ADDRESS: got 'a', allowed: HOST:PORT"),
        (("a:99999", "2", "0"), None, "JAX_COORDINATOR_ADDRESS: got 'a:99999', allowed: HOST:PORT"),
    ],
)  # fmt: skip
def test_processes_that_do_not_know_one_another(monkeypatch, variables, result, expected):
    with pytest.raises(DeviceError) as caught:
        join(monkeypatch, *variables, result=result)
    assert expected in str(caught.value)


def test_a_first_process_that_does_not_listen_is_waited_for_and_then_said(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
        monkeypatch.setattr(devices, "_PATIENCE", 0.0)
        with pytest.raises(DeviceError, match=rf"nothing listens at JAX_COORDINATOR.*={address}"):
            join(monkeypatch, address, "2", "1")
        # It may come later than the others.
        monkeypatch.setattr(devices, "_PATIENCE", 20.0)
        timer = threading.Timer(0.1, probe.listen)
        timer.start()
        assert join(monkeypatch, address, "2", "1")
        timer.join()


OUT = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9663676416 bytes."


def fail(work, text=OUT, **sections) -> str:
    with (
        pytest.raises(DeviceError) as caught,
        explain_memory(work, "training of round 3", Config(**sections)),
    ):
        raise jax.errors.JaxRuntimeError(text)
    return str(caught.value)


def test_the_end_of_a_devices_memory_says_where_and_what_to_lower(monkeypatch):
    assert fail("train") == (
        "out of device memory in training of round 3 (9.0 GiB more wanted); lower "
        "train.tokens_per_device (now 16384), or set model.remat=full (now auto), or set "
        "optimizer.moments_dtype=bfloat16 (now float32), or take more devices with mesh.fsdp "
        "(now 1); what is done is kept: the same command with these settings goes on from there"
    )
    settled = {"model": ModelConfig(remat="full"), "train": TrainConfig(tokens_per_device=512)}
    message = fail("train", **settled)
    assert "model.remat" not in message and "train.tokens_per_device (now 512)" in message
    assert "lower sampling.slots (now 256), or lower sampling.max_tokens" in fail("sample")
    assert "lower train.tokens_per_device (now 16384), or take" in fail("score")
    for work, name, count in (("signs", "watch", 128), ("rescore", "rescore", 8)):
        found = f"(now 16384), or set rounds.{name}_samples=0 (now {count}), or take"
        assert found in fail(work)
    assert "set model.params_dtype=bfloat16 (now float32), or take" in fail("load")
    assert "set lora.base=int8 (now compute)" in fail("load", lora=LoraConfig(rank=8))
    text = "RESOURCE_EXHAUSTED: XLA:TPU compile error.\n Used 18.4G of 15.5G hbm."
    assert "(XLA:TPU compile error. Used 18.4G of 15.5G hbm.)" in fail("train", text)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("16.00MiB", "16.0 MiB"),
        ("64.0KiB", "64 KiB"),
        ("1.50GiB", "1.5 GiB"),
        ("2TiB", "2048.0 GiB"),
    ],
)
def test_what_a_gpu_says_it_wanted_is_read(wanted, said):
    """As its allocator says it, alone or inside of the autotuner's report."""
    text = (
        "RESOURCE_EXHAUSTED: Failed to get configs for: 7 out of 41 instructions. Example failure: "
        f"Out of memory while trying to allocate {wanted} with allocator GPU_0_bfc on device 0."
    )
    assert f"in training of round 3 ({said} more wanted); lower" in fail("train", text)


def test_a_real_end_of_memory_is_known():
    with (
        pytest.raises(DeviceError, match=r"out of device memory in a test \(262144\.0 GiB more"),
        explain_memory("sample", "a test", Config()),
    ):
        jax.numpy.zeros(1 << 46).block_until_ready()


def test_how_much_a_device_has_is_said_where_it_is_known(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 2**34}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert "(9.0 GiB more wanted of 16.0 GiB a device)" in fail("train")


def test_other_errors_of_a_device_and_explained_ones_pass():
    for error in (jax.errors.JaxRuntimeError("INTERNAL: x"), ValueError("RESOURCE_EXHAUSTED")):
        with pytest.raises(type(error)) as caught, explain_memory("load", "x", Config()):
            raise error
        assert caught.value is error
    with (
        pytest.raises(DeviceError, match="in the inner one"),
        explain_memory("load", "the outer one", Config()),
        explain_memory("train", "the inner one", Config()),
    ):
        raise jax.errors.JaxRuntimeError(OUT)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops=false", False),
        ("--xla_other='1 2' --xla_gpu_exclude_nondeterministic_ops=1", True),
    ],
)
def test_a_gpu_is_deterministic_by_its_flags(monkeypatch, flags, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert devices.is_deterministic() is expected
