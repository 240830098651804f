import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from halos_jax import sharding
from halos_jax.config import ConfigError, MeshConfig


@pytest.fixture
def log(caplog):
    sharding._log_replicated.cache_clear()
    caplog.set_level("WARNING", logger="halos_jax.sharding")
    return caplog


def test_make_mesh_fills_the_open_axis():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_names == sharding.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.describe(mesh) == "data=2, fsdp=2, tensor=2"
    assert sharding.num_row_shards(mesh) == 4


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3, fsdp=1, tensor=1),
        MeshConfig(data=-1, fsdp=3, tensor=1),
        MeshConfig(data=-1, fsdp=16, tensor=1),
        MeshConfig(data=4, fsdp=4, tensor=1),
    ],
)
def test_make_mesh_refuses_sizes_that_do_not_fit(config):
    with pytest.raises(ConfigError, match=r"mesh: got .* 8 devices; allowed"):
        sharding.make_mesh(config)


def test_rules_give_the_mesh_axes(mesh):
    spec = sharding.partition_spec((None, "embed", "heads", None), (3, 8, 4, 5), mesh)
    assert spec == PartitionSpec(None, "fsdp", "tensor", None)
    spec = sharding.partition_spec(("rows", None), (8, 5), mesh)
    assert spec == PartitionSpec(("data", "fsdp"), None)
    assert sharding.partition_spec(("no_rule",), (8,), mesh) == PartitionSpec(None)


def test_every_rule_names_mesh_axes():
    for rule in sharding.RULES.values():
        names = {rule} if isinstance(rule, str) else set(rule)
        assert names <= set(sharding.MESH_AXES)


def test_a_dimension_that_does_not_divide_is_replicated_and_logged_once(mesh, log):
    for _ in range(3):
        spec = sharding.partition_spec(("kv_heads", "embed"), (3, 8), mesh)
        assert spec == PartitionSpec(None, "fsdp")
    (record,) = log.records
    assert "'kv_heads' of size 3 does not divide by 2 devices" in record.getMessage()


def test_one_device_replicates_silently(mesh1, log):
    spec = sharding.partition_spec(("rows", "embed"), (3, 5), mesh1)
    assert spec == PartitionSpec(None, None)
    assert not log.records


def test_a_mesh_axis_goes_to_the_first_dimension_that_asks(mesh, log):
    spec = sharding.partition_spec(("heads", "mlp"), (4, 4), mesh)
    assert spec == PartitionSpec("tensor", None)
    spec = sharding.partition_spec(("rows", "embed"), (8, 8), mesh)
    assert spec == PartitionSpec(("data", "fsdp"), None)
    # One that does not divide does not hold the axis for itself.
    spec = sharding.partition_spec(("heads", "mlp"), (3, 4), mesh)
    assert spec == PartitionSpec(None, "tensor")


def test_put_batch_places_rows_on_the_row_shards(mesh):
    batch = {"tokens": np.arange(32).reshape(8, 4), "count": np.float32(3)}
    placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["count"].sharding.is_fully_replicated
    for shard in placed["tokens"].addressable_shards:
        (coordinates,) = np.argwhere(mesh.devices == shard.device)
        first = 2 * (coordinates[0] * mesh.shape["fsdp"] + coordinates[1])
        assert shard.index == (slice(first, first + 2, None), slice(None, None, None))


def test_put_batch_leaves_leading_axes_whole(mesh):
    placed = sharding.put_batch(np.zeros((3, 8, 5)), mesh, leading=1)
    assert placed.sharding.spec == PartitionSpec(None, ("data", "fsdp"), None)
    assert placed.addressable_shards[0].data.shape == (3, 2, 5)
    assert sharding.put_batch(np.zeros(3), mesh, leading=1).sharding.is_fully_replicated


def test_put_batch_over_processes_builds_the_same_array(mesh, monkeypatch):
    batch = np.arange(32).reshape(8, 4)
    expected = sharding.put_batch(batch, mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    placed = sharding.put_batch(batch, mesh)
    assert placed.sharding == expected.sharding
    np.testing.assert_array_equal(placed, expected)


def test_check_divisible_says_what_to_set(mesh):
    (line,) = sharding.check_divisible(mesh, train__batch_size=30, sampling__slots=8)
    assert line.startswith("train.batch_size: got 30, but mesh.data * mesh.fsdp = 4")
    assert "--config.train.batch_size=32" in line


def test_constrain_shards_inside_jit(mesh):
    out = jax.jit(lambda x: sharding.constrain(x * 1, "rows", "mlp"))(jnp.zeros((8, 4)))
    assert out.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")


def test_constrain_outside_of_a_mesh_returns_its_argument():
    x = jnp.zeros((8, 4))
    assert sharding.constrain(x, "rows", "mlp") is x
