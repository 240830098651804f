"""The policy of another run to start from: found, refused field by field, and taken over."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halos_jax import sharding
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import open_checkpoints
from halos_jax.config import BranchConfig, Config, ConfigError, ModelConfig, schema, to_dict
from halos_jax.policies import branch as branches
from halos_jax.policies import digest
from halos_jax.training.state import init_state, make_abstract_state, set_step
from halos_jax.workdir import fingerprints
from halos_jax.workdir.manifests import Manifest, round_folder, save_manifest
from halos_jax.workdir.trees import describe_tree


def make_config(toy, workdir, **changes):
    config = Config(workdir=str(workdir), model=ModelConfig(path=str(toy / "policy")))
    return change(config, changes)


def change(config, changes):
    """Return a config with fields of sections replaced, named as "section.field"."""
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section or field: value})
    return config


@pytest.fixture
def trainer(mesh1):
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
    params = jax.device_put(params, sharding.replicated(mesh1))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
    state = make_abstract_state(abstract, optimizer, mesh1)
    return SimpleNamespace(
        abstract_state=state, optimizer=optimizer, frozen=None, params=params, layouts=None
    )


@pytest.fixture
def origin(toy, tmp_path, trainer):
    """Return the config and the state at the end of a run of 2 rounds, of which it has kept one."""
    workdir = tmp_path / "origin"
    workdir.mkdir()
    config = make_config(toy, workdir)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    files = sorted((toy / "policy").iterdir())
    entries = [
        {"name": one.name, "path": str(one), **fingerprints.fingerprint(one, whole_limit=1 << 24)}
        for one in files
    ]
    (workdir / "inputs.json").write_text(json.dumps({"model.path": entries}))
    state = init_state(trainer.params, trainer.optimizer, trainer.abstract_state)
    gradient = jax.tree.map(jnp.ones_like, state.params)
    _, moved = trainer.optimizer.update(gradient, state.opt_state)
    state = dataclasses.replace(set_step(state, 6), opt_state=moved)
    checkpoints = open_checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(6, state, Position(6, 2, layouts={"train": []}).to_dict())
    checkpoints.close()
    trained = digest.fingerprint(state.params)
    for round in (1, 2):
        round_folder(workdir, round).mkdir(parents=True)
        save_manifest(round_folder(workdir, round), Manifest(round=round, trained=trained))
    return config, state


def branch_of(config, tmp_path, **changes):
    settings = BranchConfig(workdir=config.workdir)
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"), branch=settings)
    return change(config, changes)


def test_the_newest_round_and_a_named_one_are_found(origin, tmp_path):
    config = branch_of(origin[0], tmp_path)
    for asked in (config, change(config, {"branch.round": 2})):
        found = branches.find_branch(asked)
        assert (found.save_id, found.position.round, found.position.step) == (1, 2, 6)
        assert found.trained == digest.fingerprint(origin[1].params)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"branch.round": 1}, "branch.round: got 1, but .* no checkpoint at the end of that round"),
        ({"branch.workdir": "/no/where"}, "branch.workdir: got '/no/where', allowed: the workdir"),
        ({"model.params_dtype": "bfloat16"}, "model.params_dtype: got 'bfloat16', but .*'float32'"),
        ({"lora.rank": 4}, "lora.rank: got 4, but the run .* has 0"),
        ({"lora.rank": 4}, "lora.alpha: got 16.0, but the run .* has 0.0"),
        ({"optimizer.name": "lion"}, "optimizer.name: got 'lion', .*branch.optimizer=false"),
        ({"optimizer.moments_dtype": "bfloat16"}, "optimizer.moments_dtype: got 'bfloat16'"),
        ({"loss": {"name": "ppo"}}, "loss.name: got 'ppo', .* has a value head and the other none"),
        ({"train.ema_decay": 0.9}, "train.ema_decay: got 0.9, but the run in .* has 0.0"),
        ({"rounds.reference": "previous_step"}, "rounds.reference: got 'previous_step', but"),
        ({"model.added_tokens": ("<new>",)}, "model.added_tokens: got .*<new>"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_refused_by_name(origin, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        branches.find_branch(branch_of(origin[0], tmp_path, **changes))


def test_without_the_moments_another_optimizer_may_go_on(origin, tmp_path):
    changes = {"optimizer.name": "lion", "train.ema_decay": 0.9, "branch.optimizer": False}
    assert branches.find_branch(branch_of(origin[0], tmp_path, **changes)).save_id == 1


def test_the_model_is_that_of_the_other_run_or_the_reference_is_named(origin, tmp_path, toy):
    config = branch_of(origin[0], tmp_path)
    shutil.copytree(toy / "policy", tmp_path / "moved")
    assert branches.find_branch(change(config, {"model.path": str(tmp_path / "moved")}))
    file = tmp_path / "moved" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"model.path: got .*moved', which is not the model that"):
        branches.find_branch(change(config, {"model.path": str(tmp_path / "moved")}))
    itself = {"model.path": config.branch.workdir}
    with pytest.raises(ConfigError, match=r"model.path: got .*which would become the reference"):
        branches.find_branch(change(config, itself))
    named = itself | {"model.reference": str(toy / "policy")}
    assert branches.find_branch(change(config, named)).save_id == 1
    for text in ('{"model.path": ', "[]"):
        (tmp_path / "origin" / "inputs.json").write_text(text)
        with pytest.raises(ConfigError, match=r"inputs\.json is not the JSON object that a run"):
            branches.find_branch(config)


def test_the_newest_round_is_one_round_whatever_the_other_run_does(origin, tmp_path, trainer):
    config = branch_of(origin[0], tmp_path)
    pinned = branches.pin_round(config)
    assert pinned == change(config, {"branch.round": 2}) == branches.pin_round(pinned)
    assert branches.pin_round(origin[0]) == origin[0]
    # A start that was killed before the order of the prompts was written has taken over round 2.
    checkpoints = open_checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    branches.take_over(pinned, trainer, checkpoints)
    checkpoints.close()
    theirs = open_checkpoints(tmp_path / "origin" / "checkpoints", keep=2)
    theirs.save(9, origin[1], Position(9, 3, layouts={}).to_dict())
    theirs.close()
    assert branches.find_branch(config).position.round == 3
    assert branches.pin_round(config).branch.round == 2
    (tmp_path / "run" / "prompts.json").write_text("{}")
    assert branches.pin_round(config) == config  # nothing asks the other run any more


@pytest.mark.parametrize("with_moments", [True, False])
def test_a_start_is_taken_over_counted_anew_and_recorded(origin, tmp_path, trainer, with_moments):
    config = branch_of(origin[0], tmp_path, **{"branch.optimizer": with_moments})
    before = describe_tree(tmp_path / "origin")
    checkpoints = open_checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    state = branches.take_over(config, trainer, checkpoints)
    jax.tree.map(np.testing.assert_array_equal, state.params, origin[1].params)
    adam, schedule = state.opt_state
    moved = origin[1].opt_state[0].mu["w"] if with_moments else jnp.zeros(4)
    np.testing.assert_array_equal(adam.mu["w"], moved)
    # The schedule begins anew; what Adam divides its moments by belongs to them.
    assert (int(state.step), int(schedule.count), int(adam.count)) == (0, 0, with_moments)
    restored, record = checkpoints.restore(trainer.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert Position.from_dict(record).rounds_done == 0 and record["layouts"] == {"train": []}
    made = branches.read_origin(checkpoints)
    checkpoints.close()
    assert made["sums"] == branches.hash_policy(tmp_path / "origin", 1) != ""
    assert made == {
        "workdir": str(tmp_path / "origin"),
        "task": "online",
        "round": 2,
        "step": 6,
        "checkpoint": 1,
        "optimizer": with_moments,
        "fingerprint": digest.fingerprint(origin[1].params),
        "sums": made["sums"],
        "manifest": "",
    }
    assert describe_tree(tmp_path / "origin") == before


def test_a_policy_that_is_not_the_one_that_was_trained_is_refused(origin, tmp_path, trainer):
    folder = round_folder(tmp_path / "origin", 2)
    save_manifest(folder, Manifest(round=2, trained="0" * 32))
    config = branch_of(origin[0], tmp_path)
    checkpoints = open_checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    with pytest.raises(ConfigError, match="but its round ended with 000000000000"):
        branches.take_over(config, trainer, checkpoints)
    assert checkpoints.list_ids() == []
    wide = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=trainer.params["b"].sharding)
    params = {**trainer.abstract_state.params, "w": wide}
    trainer.abstract_state = dataclasses.replace(trainer.abstract_state, params=params)
    with pytest.raises(ConfigError, match=r"(?s)branch.workdir: .*params/w: this run float32\[5\]"):
        branches.take_over(config, trainer, checkpoints)
    checkpoints.close()


def test_a_task_that_has_finished_is_an_origin_without_rounds(origin, tmp_path):
    plain = to_dict(change(origin[0], {"task": "align"}))
    (tmp_path / "origin" / "config.json").write_text(json.dumps(plain))
    config = branch_of(origin[0], tmp_path)
    with pytest.raises(ConfigError, match="a run that has not finished"):
        branches.find_branch(config)
    (tmp_path / "origin" / "final").mkdir()
    assert branches.find_branch(config).save_id == 1
    with pytest.raises(ConfigError, match="which has no rounds; allowed: 0"):
        branches.find_branch(change(config, {"branch.round": 2}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"branch.workdir": "DIR", "task": "align"}, ""),
        ({"branch.workdir": "DIR", "task": "sft"}, "branch.workdir: got 'DIR', allowed with task"),
        ({"branch.round": 2}, "branch.round, branch.optimizer: got 2, True, allowed without"),
        ({"train.round": 2, "task": "align"}, ""),
        ({"train.round": 2}, "train.round: got 2, allowed with task='online': 0"),
    ],
)
def test_fields_that_nothing_would_read_are_refused(changes, said):
    found = branches.find_problems(change(Config(), changes))
    assert len(found) == bool(said) and all(line.startswith(said) for line in found)
    assert schema.to_plain(Config())["branch"] == {"workdir": "", "round": 0, "optimizer": True}
