"""Params that are loaded once and then copied from the host's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from halos_jax.config import MeshConfig
from halos_jax.policies import host_copy
from halos_jax.policies.host_copy import HostCopy
from halos_jax.sharding import make_mesh


@pytest.fixture
def params():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    values = jnp.arange(32, dtype=jnp.bfloat16).reshape(4, 8)
    return {"w": jax.device_put(values, split), "norm": {"scale": jnp.ones(3)}}


def test_params_are_loaded_once_and_come_back_as_they_were(params):
    calls, copy = [], HostCopy()

    def load():
        calls.append(1)
        return params

    first, again = copy.load(load), copy.load(load)
    assert len(calls) == 1 and first is params
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert other.dtype == one.dtype and other.sharding == one.sharding
        np.testing.assert_array_equal(other, one)


def test_the_copy_outlives_arrays_that_are_deleted(params):
    copy = HostCopy()
    values = np.array(params["w"])
    for leaf in jax.tree.leaves(copy.load(lambda: params)):
        leaf.delete()
    np.testing.assert_array_equal(copy.load(lambda: pytest.fail("loaded again"))["w"], values)


@pytest.mark.parametrize(("free", "calls"), [(2 * (64 + 12), 1), (2 * (64 + 12) - 1, 2), (0, 2)])
def test_nothing_is_kept_where_it_would_take_more_than_half_of_the_memory(
    monkeypatch, params, free, calls
):
    monkeypatch.setattr(host_copy, "free_memory", lambda: free)
    seen, copy = [], HostCopy()
    for _ in range(2):
        copy.load(lambda: seen.append(1) or params)
    assert len(seen) == calls


def test_free_memory_is_that_of_the_host(monkeypatch):
    assert 1 << 20 < host_copy.free_memory() < 1 << 50

    def refuse(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(host_copy.os, "sysconf", refuse)
    assert host_copy.free_memory() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_is_left_of_its_limit(monkeypatch, tmp_path, version):
    names = {2: ("memory.max", "memory.current", "memory.stat")}
    files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    names[1] = tuple(f"memory/{name}" for name in files)
    cache = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (tmp_path / "memory").mkdir()
    texts = ("5000000\n", "4000000\n", f"anon 3500000\n{cache} 40000\n")
    for name, text in zip(names[version], texts, strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_copy, "_CONTROL", tmp_path)
    assert host_copy.free_memory() == 5000000 - 4000000 + 40000
    (tmp_path / names[version][0]).write_text("max\n")
    assert host_copy.free_memory() > 1 << 24
    (tmp_path / names[version][0]).write_text("3000000\n")  # lowered below what is used
    assert host_copy.free_memory() == 0
