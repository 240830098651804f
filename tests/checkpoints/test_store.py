import functools
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from halos_jax.checkpoints import store
from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.types import TrainState

END, INSIDE = {"round": 1, "in_stage": False}, {"round": 1, "in_stage": True}


def make_mesh(data, fsdp, tensor):
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((data, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3)


def make_optimizer():
    schedule = optax.linear_schedule(1e-4, 1e-3, 5)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


@functools.cache
def make_state(seed=0, *, steps=2):
    """A TrainState whose optimizer has moved, with float32, bfloat16 and integer leaves."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (16, 8)),
        "layers": {"q": jax.random.normal(keys[1], (2, 8, 4, 2)).astype(jnp.bfloat16)},
        "norm": jax.random.normal(keys[2], (8,)),
    }
    optimizer = make_optimizer()
    opt_state = optimizer.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda leaf, step=step: leaf * (step + 1.3), params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    return TrainState(step=jnp.int32(steps), params=params, opt_state=opt_state)


def place(state, mesh):
    """Shard the first dimension that divides over the mesh's axes, one after the other."""

    def one(leaf):
        entries = [None] * leaf.ndim
        for axis in ("fsdp", "tensor", "data"):
            for index, size in enumerate(leaf.shape):
                if entries[index] is None and size % mesh.shape[axis] == 0:
                    entries[index] = axis
                    break
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*entries)))

    return jax.tree.map(one, state)


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def host(tree):
    # Copies: on CPU numpy would otherwise look into buffers that are about to be donated.
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.tobytes() == right.tobytes()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    """A folder with one finished checkpoint, its store and its state."""
    checkpoints, state = open_checkpoints(folder, keep=1), make_state()
    checkpoints.save(2, state, {**END, "cursor": 7})
    checkpoints.finish()
    yield checkpoints, state
    checkpoints.close()


def test_state_optimizer_and_round_state_come_back_bit_identical(saved, folder):
    _, state = saved
    reopened = open_checkpoints(folder, keep=1)
    restored, round_state = reopened.restore(abstract(state))
    assert_identical(restored, state)
    assert isinstance(restored, TrainState)
    assert round_state == {**END, "cursor": 7, "step": 2}
    assert reopened.read_round_state(reopened.latest()) == round_state
    # The restored optimizer goes on exactly as the one that was never stopped.
    gradients = jax.tree.map(jnp.ones_like, state.params)
    update = make_optimizer().update
    assert_identical(
        update(gradients, restored.opt_state, restored.params),
        update(gradients, state.opt_state, state.params),
    )
    reopened.close()


def test_restore_onto_another_mesh(folder):
    state = place(make_state(), make_mesh(8, 1, 1))
    template = abstract(place(state, make_mesh(2, 2, 2)))
    checkpoints = open_checkpoints(folder, keep=1)
    checkpoints.save(2, state, END)
    checkpoints.finish()
    restored, _ = checkpoints.restore(template)
    assert_identical(restored, state)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(restored)]
    assert shardings == [leaf.sharding for leaf in jax.tree.leaves(template)]
    assert len({str(sharding.spec) for sharding in shardings}) > 2
    assert len(restored.params["embed"].sharding.device_set) == 8
    checkpoints.close()


def test_restore_params_alone(saved):
    checkpoints, state = saved
    params = checkpoints.restore_params(abstract(state.params))
    assert_identical(params, state.params)


def test_what_is_exported_is_the_average_without_the_value_head(folder):
    mesh, checkpoints = make_mesh(2, 2, 2), open_checkpoints(folder, keep=2)
    state = make_state()
    trained = {**state.params, "value": {"first": jnp.ones((8, 8))}}
    checkpoints.save(2, place(state.replace(params=trained), mesh), END)
    ema = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) + 1, state.params)
    checkpoints.save(3, place(state.replace(params=trained, ema=ema), mesh), END | {"round": 2})
    checkpoints.save(4, place(state.replace(params=trained), mesh), INSIDE | {"round": 3})
    checkpoints.finish()
    template = abstract(place(state.params, mesh))
    first, second, none = map(checkpoints.find_round_end, (1, 2, 3))
    assert none is None
    assert_identical(checkpoints.restore_policy(template, first), place(state.params, mesh))
    averaged = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), ema, state.params)
    assert_identical(checkpoints.restore_policy(template, second), place(averaged, mesh))
    again = checkpoints.save(5, place(state, mesh), END | {"round": 2})
    checkpoints.finish()
    assert checkpoints.find_round_end(2) == again > second
    checkpoints.close()


@pytest.mark.parametrize("size", [8, 1_000_000])  # Orbax treats small and large arrays apart
def test_the_state_may_be_donated_right_after_save(folder, size):
    checkpoints = open_checkpoints(folder, keep=1)
    mesh = make_mesh(2, 2, 2)
    state = place(TrainState(jnp.int32(0), {"w": jnp.arange(float(size))}, ()), mesh)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    for _ in range(3):
        expected, template = host(state), abstract(state)
        checkpoints.save(int(state.step), state, END)
        for _ in range(4):
            state = step(state)
        checkpoints.finish()
        restored, _ = checkpoints.restore(template)
        assert_identical(restored, expected)
    checkpoints.close()


def test_save_ids_grow_though_the_step_does_not(folder):
    checkpoints, state = open_checkpoints(folder, keep=3), make_state()
    ids = [checkpoints.save(2, state, {**END, "round": round}) for round in (1, 2)]
    checkpoints.close()
    reopened = open_checkpoints(folder, keep=3)
    ids.append(reopened.save(2, state, {**END, "round": 3}))
    reopened.finish()
    assert ids == [1, 2, 3] and reopened.latest() == 3
    assert [reopened.read_round_state(save_id)["round"] for save_id in ids] == [1, 2, 3]
    assert {reopened.read_round_state(save_id)["step"] for save_id in ids} == {2}
    reopened.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("keep", "saves", "left"),
    [
        (1, [END, END, END], [3]),
        (2, [END, END, END], [2, 3]),
        (1, [END, INSIDE, INSIDE], [1, 3]),
        (1, [END, INSIDE, INSIDE, END], [4]),
        (2, [END, INSIDE, END, INSIDE], [1, 3, 4]),
    ],
)
def test_retention(folder, keep, saves, left):
    checkpoints, state = open_checkpoints(folder, keep=keep), make_state()
    for round_state in saves:
        checkpoints.save(2, state, round_state)
    checkpoints.finish()
    assert names(folder) == [f"{save_id:08d}" for save_id in left]
    checkpoints.close()


def test_the_old_checkpoint_goes_only_after_the_new_one_is_verified(saved, folder, monkeypatch):
    checkpoints, state = saved
    seen = []

    def fail(self, save_id):
        seen.append((save_id, names(folder)))
        raise CheckpointError("not readable")

    with monkeypatch.context() as patch:
        patch.setattr(store.Checkpoints, "verify", fail)
        checkpoints.save(3, state, END)
        with pytest.raises(CheckpointError, match="not readable"):
            checkpoints.finish()
    assert seen == [(2, ["00000001", "00000002"])]
    assert names(folder) == ["00000001", "00000002"]
    checkpoints.save(3, state, END)
    checkpoints.finish()
    assert names(folder) == ["00000003"]


def test_retention_leaves_everything_else_alone(folder, tmp_path):
    outside = tmp_path / "sft"
    outside.mkdir()
    (outside / "model.safetensors").write_text("precious")
    folder.mkdir()
    (folder / "00000000").symlink_to(outside)
    (folder / "00000000.deleting").symlink_to(outside)
    (folder / "notes").mkdir()
    (folder / "123").mkdir()
    checkpoints = open_checkpoints(folder, keep=1)
    for _ in range(3):
        checkpoints.save(2, make_state(), END)
    checkpoints.close()
    assert names(folder) == ["00000000", "00000000.deleting", "00000003", "123", "notes"]
    assert (outside / "model.safetensors").read_text() == "precious"


def test_opening_removes_leftovers_and_finishes_an_interrupted_pruning(saved, folder):
    _, state = saved
    unpruned = open_checkpoints(folder, keep=9)
    unpruned.save(3, state, END)
    unpruned.close()
    (folder / "00000003.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "00000004.deleting" / "state").mkdir(parents=True)
    reopened = open_checkpoints(folder, keep=1)
    assert names(folder) == ["00000001", "00000002"]
    # The replaced one goes only when the newest has been read whole.
    assert reopened.restore_newest(abstract(state))[1]["step"] == 3
    assert names(folder) == ["00000002"]
    reopened.close()


def test_what_is_damaged_is_set_aside_for_the_one_before_it(saved, folder, caplog):
    _, state = saved
    unpruned = open_checkpoints(folder, keep=9)
    unpruned.save(3, state, END)
    unpruned.close()
    (folder / "00000002" / "round" / "metadata").write_text("{")
    reopened = open_checkpoints(folder, keep=1)
    assert names(folder) == ["00000001", "00000002"]
    with pytest.raises(CheckpointError, match=r"00000002 is incomplete.*others: 00000001"):
        reopened.restore(abstract(state))
    assert reopened.read_round_state()["step"] == 2  # before it is set aside, too
    restored, record = reopened.restore_newest(abstract(state))
    assert_identical(restored, state)
    assert record["step"] == 2 and names(folder) == ["00000001", "00000002.damaged"]
    assert "00000002 is incomplete" in caplog.text
    assert caplog.text.count("going on from") == 1
    reopened.save(3, state, END)
    reopened.close()
    assert len(names(folder)) == 1


def delete_metadata(checkpoint):
    (checkpoint / "state" / "_METADATA").unlink()


def delete_data(checkpoint):
    for path in checkpoint.glob("state/**/d/*"):
        path.unlink()


def truncate_data(checkpoint):
    for path in checkpoint.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def delete_round(checkpoint):
    (checkpoint / "round" / "metadata").unlink()


@pytest.mark.parametrize("damage", [delete_metadata, delete_data, truncate_data, delete_round])
def test_a_damaged_checkpoint_is_one_clear_error(saved, folder, damage):
    checkpoints, state = saved
    damage(folder / "00000001")
    with pytest.raises(CheckpointError, match=r"00000001 is incomplete or corrupt.*no other one"):
        checkpoints.restore(abstract(state))


def test_another_structure_is_refused_with_every_difference(saved):
    checkpoints, state = saved
    params = dict(state.params)
    del params["norm"]
    params["embed"] = jnp.zeros((17, 8))
    params["head"] = jnp.zeros((3,))
    params["layers"] = {"q": params["layers"]["q"].astype(jnp.float32)}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(TrainState(state.step, params, state.opt_state)))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not fit this run: 4 array(s) differ:")
    assert lines[1:5] == [
        "  - params/embed: this run float32[17, 8], checkpoint float32[16, 8]",
        "  - params/head: missing (this run: float32[3])",
        "  - params/layers/q: this run float32[2, 8, 4, 2], checkpoint bfloat16[2, 8, 4, 2]",
        "  - params/norm: extra (checkpoint: float32[8])",
    ]
    with pytest.raises(CheckpointError, match="params/norm: extra"):
        checkpoints.restore_params(abstract(params))


def test_no_checkpoint(folder):
    checkpoints = open_checkpoints(folder, keep=1)
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match="there are: none"):
        checkpoints.restore(abstract(make_state()))
    checkpoints.close()


def test_a_write_that_fails_keeps_the_old_checkpoint(folder):
    """A limit on the size of files makes the array writes themselves fail, as a full disk does."""
    state = TrainState(jnp.int32(1), {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}, ())
    checkpoints = open_checkpoints(folder, keep=1)
    checkpoints.save(1, state, END)
    checkpoints.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"00000002 could not be written.*check the disk"):
            checkpoints.save(2, state, END)
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    reopened = open_checkpoints(folder, keep=1)
    assert names(folder) == ["00000001"]
    assert_identical(reopened.restore(abstract(state))[0], state)
    reopened.close()


KILLED_SAVE = """
    import os, sys
    import jax.numpy as jnp
    from halos_jax.checkpoints.store import open_checkpoints
    from halos_jax.types import TrainState

    checkpoints = open_checkpoints(sys.argv[1], keep=1)
    for step in range(1, 1000):
        state = TrainState(jnp.int32(step), {"w": jnp.full((600_000,), float(step))}, ())
        checkpoints.save(step, state, {"in_stage": False})
        print(step, flush=True)
"""


def test_kill_in_the_middle_of_a_save(folder):
    """SIGKILL at several instants of a save: the newest is whole, nothing else stays once read."""
    template = abstract(TrainState(jnp.int32(0), {"w": jnp.zeros((600_000,))}, ()))
    before, in_flight = 0, 0
    for delay in (0.0, 0.01, 0.03):
        command = [sys.executable, "-c", textwrap.dedent(KILLED_SAVE), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(3):  # the third save has begun, so the second has been verified
            assert process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        in_flight += any("tmp" in name for name in names(folder))
        checkpoints = open_checkpoints(folder, keep=1)
        newest = checkpoints.latest()
        restored, round_state = checkpoints.restore_newest(template)
        assert names(folder) == [f"{newest:08d}"]
        assert np.unique(np.asarray(restored.params["w"])).tolist() == [round_state["step"]]
        assert round_state["step"] >= 2 and checkpoints.latest() >= before + 2
        before = checkpoints.latest()
        checkpoints.close()
    assert in_flight, "no kill came while a save was being written"
