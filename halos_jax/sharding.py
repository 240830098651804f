"""The device mesh and the one table from logical array axes to mesh axes."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from halos_jax.config import ConfigError, MeshConfig
from halos_jax.integers import round_up
from halos_jax.once import once_a_run

logger = logging.getLogger(__name__)

_Tree = TypeVar("_Tree")  # a pytree of arrays
_Run = TypeVar("_Run", bound=Callable[..., Any])

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes). All other axes are replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # packed rows of a batch, and sampler slots
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "experts": "tensor",  # before "mlp", which gets the axis if experts do not divide evenly
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig) -> Mesh:
    """Make the `("data", "fsdp", "tensor")` mesh over all devices; one size may be -1.

    Raises:
      ConfigError: if the product of the sizes is not the number of devices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    count = jax.device_count()
    if -1 in sizes:
        fixed = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // fixed, 1)
    if math.prod(sizes) != count:
        raise ConfigError(
            f"mesh: got {dict(zip(MESH_AXES, sizes, strict=True))}, but there are {count} devices; "
            "allowed: sizes whose product is the number of devices; set one of them to -1"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def num_row_shards(mesh: Mesh) -> int:
    """Return the number of device groups that the rows of a batch are split over."""
    return int(mesh.shape["data"]) * int(mesh.shape["fsdp"])


def check_divisible(mesh: Mesh, **sizes: int) -> list[str]:
    """Return an error line for each size that is no multiple of the number of row shards.

    Args:
      sizes: by path in the config, with "__" for ".".
    """
    shards = num_row_shards(mesh)
    lines = []
    for name, size in sizes.items():
        if isinstance(size, int) and size % shards:  # a wrong type is reported by others
            path, upper = name.replace("__", "."), round_up(size, shards)
            lines.append(
                f"{path}: got {size}, but mesh.data * mesh.fsdp = {shards}; allowed: multiples of "
                f"{shards}; set --config.{path}={upper}, or a smaller mesh"
            )
    return lines


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Return the PartitionSpec of an array with the logical `axes`.

    A dimension that its mesh axes do not divide is replicated, which is logged once. If two
    dimensions want the same mesh axis, the first one gets it.
    """
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES.get(axis) if axis else None
        names = (rule,) if isinstance(rule, str) else rule or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if parts == 1 or used & set(names):
            entries.append(None)
        elif size % parts:
            _log_replicated(str(axis), size, parts)
            entries.append(None)
        else:
            used |= set(names)
            entries.append(rule)
    return PartitionSpec(*entries)


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return `partition_spec` bound to `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: Any, mesh: Mesh, *, leading: int = 0) -> Any:
    """Return shardings for a pytree of `[..., rows, ...]` arrays; scalars are replicated.

    `leading` axes before the rows (microbatches) are not sharded.
    """

    def one(leaf: Any) -> NamedSharding:
        if len(leaf.shape) <= leading:
            return replicated(mesh)
        axes = [None] * leading + ["rows"] + [None] * (len(leaf.shape) - leading - 1)
        return named_sharding(axes, leaf.shape, mesh)

    return jax.tree.map(one, batch)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain `x`, and its gradient, to the sharding of its logical `axes`; no-op on one device.

    This is needed between two layers that both split their outputs over "tensor". On meshes with
    more than one device along all three axes, XLA's partitioner (at least in jax 0.10 and 0.12)
    mixes up the rows of a product that sums over "tensor", uses a weight split over "fsdp", and
    whose result is to be split over "tensor" again. The gradient of an activation between two such
    layers is such a product. It goes wrong only at sizes at which the partitioner deems it cheaper
    to move the rows than to gather the weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(
        x, partition_spec(axes, x.shape, mesh)
    )
    return constrained


def is_split(axis: str) -> bool:
    """Tell whether the current mesh has several devices along its `axis`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[axis] > 1


def mesh_spec(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Return `partition_spec` on the current mesh, with an entry for every axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return PartitionSpec(*[None] * len(shape))
    return partition_spec(axes, shape, mesh)


def run_on_mesh(run: _Run, *, in_specs: object, out_specs: object) -> _Run:
    """Return `run` under `shard_map` on the current mesh, or `run` itself on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_parts(part: jax.Array, row_axes: Sequence[str], spec: PartitionSpec) -> jax.Array:
    """Sum a gradient's parts over the row shards, inside `run_on_mesh`.

    A dimension that `spec` splits over one of `row_axes` stays split: each device gets the sum of
    its own part only, at half the traffic of an all-reduce.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return part
    for axis in row_axes:
        if axis in tuple(spec):
            dimension = tuple(spec).index(axis)
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True)
        else:
            part = jax.lax.psum(part, axis)
    return part


@once_a_run
def _log_replicated(axis: str, size: int, parts: int) -> None:
    logger.warning(
        "axis %r of size %d does not divide by %d devices: replicated", axis, size, parts
    )


def put_batch(batch: _Tree, mesh: Mesh, *, leading: int = 0) -> _Tree:
    """Place a host batch (the same on every process) on the devices that hold its rows."""
    shardings = batch_shardings(batch, mesh, leading=leading)
    if jax.process_count() == 1:
        placed: _Tree = jax.device_put(batch, shardings)
        return placed
    placed = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        batch,
        shardings,
    )
    return placed


def take_from_first(value: int) -> int:
    """Return, on all processes, the number (below 2^31) that the first one passes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(what: str) -> None:
    """Wait until all processes reach `what`, so that the files of process 0 can be read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def describe(mesh: Mesh) -> str:
    """Return the mesh in one line for logs."""
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
