"""Checksums are those of the content, however it lies on a mesh, and miss no changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from halos_jax.checkpoints import checksums
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import open_checkpoints

SPECS = {
    "params/embed": PartitionSpec("fsdp", "tensor"),
    "params/q": PartitionSpec(None, ("fsdp", "tensor")),
    "params/norm": PartitionSpec(),
    "step": PartitionSpec(),
}


def make_arrays() -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "params/embed": jax.random.normal(keys[0], (16, 8)),
        "params/q": jax.random.normal(keys[1], (2, 8, 4)).astype(jnp.bfloat16),
        "params/norm": jax.random.normal(keys[2], (8,)),
        "step": jnp.int32(7),
    }


def place(arrays, data, fsdp, tensor) -> dict:
    axes, count = ("data", "fsdp", "tensor"), data * fsdp * tensor
    devices, kinds = jax.devices()[:count], (AxisType.Auto,) * 3
    mesh = jax.make_mesh((data, fsdp, tensor), axes, axis_types=kinds, devices=devices)
    return {
        name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
        for name, array in arrays.items()
    }


def assert_identical(got, expected):
    for name, array in expected.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


MESHES = [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 1, 8)]


def test_each_chunk_of_a_mesh_has_one():
    sums = checksums.compute(place(make_arrays(), 2, 2, 2))
    counts = {name: len(chunks) for name, chunks in sums.items()}
    assert counts == {"params/embed": 4, "params/q": 4, "params/norm": 1, "step": 1}
    assert [bounds for bounds, _ in sums["params/embed"]] == [
        ((0, 8), (0, 4)),
        ((0, 8), (4, 8)),
        ((8, 16), (0, 4)),
        ((8, 16), (4, 8)),
    ]
    assert sums["step"][0][0] == ()
    # Replicas are one chunk, and its checksum that of its bytes alone.
    assert sums["params/norm"] == checksums.compute(place(make_arrays(), 1, 1, 1))["params/norm"]


@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("source", MESHES)
def test_they_are_found_again_on_any_mesh(source, target):
    sums = checksums.compute(place(make_arrays(), *source))
    assert checksums.find_wrong(place(make_arrays(), *target), sums) == []
    arrays = make_arrays()
    arrays["params/q"] = arrays["params/q"].at[1, 7, 3].multiply(1.01)
    arrays["step"] = jnp.int32(6)
    assert checksums.find_wrong(place(arrays, *target), sums) == ["params/q", "step"]
    host = {name: np.asarray(array) for name, array in arrays.items()}
    assert checksums.find_wrong(host, sums) == ["params/q", "step"]


def test_what_has_no_checksum_is_not_looked_at():
    assert checksums.find_wrong(make_arrays(), {}) == []


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("target", [(1, 1, 1), (1, 4, 2)])
def test_a_flipped_bit_anywhere_in_the_chunks_is_seen_on_any_mesh(folder, target):
    """Saved on 2x2x2, read on one device and on another mesh."""
    checkpoints = open_checkpoints(folder, keep=1)
    state = place(make_arrays(), 2, 2, 2)
    checkpoints.save(2, state, {})
    checkpoints.close()
    template = place(make_arrays(), *target)
    reopened = open_checkpoints(folder, keep=1)
    assert_identical(reopened.restore_newest(template)[0], make_arrays())
    files = [path for path in (folder / "00000001").glob("state/**/d/*") if path.is_file()]
    seen = 0
    for path in files:
        size = path.stat().st_size
        for at in range(size // 7, size, max(size // 3, 1)):
            flip(path, at)
            try:
                assert_identical(reopened.restore_newest(template)[0], make_arrays())
            except CheckpointError as error:
                assert "00000001 is incomplete or corrupt" in str(error)
                seen += 1
            flip(path, at)
    assert seen
    reopened.close()
