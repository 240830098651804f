"""The way back: the policy of another round, the steps of this one, a smaller learning rate."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import Config, OptimizerConfig
from halos_jax.course.verdicts import Verdict
from halos_jax.rounds.outcome import fallback
from halos_jax.rounds.progress import Progress
from halos_jax.training import loop as training
from halos_jax.training.optim import make_optimizer, make_schedule
from halos_jax.types import TrainState
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from tests.rounds.stand_ins import make_run, make_workspace

OPTIMIZER = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 9))


def make_state(step, value):
    params = {"w": jnp.full(2, float(value))}
    return TrainState(jnp.int32(step), params, OPTIMIZER.init(params))


@pytest.fixture
def go_back(tmp_path):
    """Return a function that falls back before round 3 as round 2 says.

    It returns the run afterwards, the progress, and the run before.
    """

    def call(to, *, round=3, trained=2, stage_step=0, saved=(1,), verdict="retry"):
        folder = round_folder(tmp_path, 2)
        folder.mkdir(parents=True, exist_ok=True)
        decision = Verdict(verdict, (), to, 0.5).to_record()
        manifests.save_manifest(folder, Manifest(2, decisions={"guard": decision}))
        lower = Config(optimizer=OptimizerConfig(learning_rate=1e-6))
        run = make_run(
            workdir=tmp_path,
            trainer=SimpleNamespace(abstract_state="abstract", frozen=None),
            checkpoints=SimpleNamespace(
                find_round_end=lambda round: round if round in saved else None,
                restore=lambda abstract, save_id: (make_state(4, save_id), {}),
            ),
            remake=lambda place: (
                make_workspace(tmp_path, config=lower),
                SimpleNamespace(abstract_state="abstract", frozen=None, place=dict(place)),
            ),
        )
        progress = Progress(make_state(9, 77), trained, stage_step)
        return fallback.fall_back(run, progress, round), progress, run

    return call


def test_params_and_moments_go_back_and_the_steps_go_on(go_back):
    run, progress, before = go_back(1)
    assert np.array_equal(progress.state.params["w"], [1.0, 1.0])
    assert int(progress.state.step) == 9 and progress.round == 2
    leaves = jax.tree.leaves(progress.state.opt_state)
    assert sorted(int(one) for one in leaves if one.ndim == 0) == [
        0,
        9,
    ]  # of the moments, and of the schedule
    assert run.config.optimizer.learning_rate == 1e-6
    assert run.trainer.place == {"round": 3, "step": 9}
    assert run.prompts is before.prompts and run.checkpoints is before.checkpoints


def test_the_sft_policy_starts_with_new_moments(go_back, monkeypatch):
    asked = []
    monkeypatch.setattr(fallback, "load_start", lambda *given: asked.append(given) or "sft")
    monkeypatch.setattr(training, "start_state", lambda trainer, params: make_state(0, len(params)))
    _, progress, _ = go_back(0)
    assert np.array_equal(progress.state.params["w"], [3.0, 3.0]) and len(asked) == 1
    assert int(progress.state.step) == 9


def test_from_the_last_round_itself_only_the_learning_rate_changes(go_back):
    run, progress, _ = go_back(2)
    assert np.array_equal(progress.state.params["w"], [77.0, 77.0])
    assert run.config.optimizer.learning_rate == 1e-6


@pytest.mark.parametrize(
    "other",
    [
        {"round": 2, "trained": 2},  # it is trained already
        {"stage_step": 2},  # it is half trained: it has gone back before
        {"round": 4},
        {"verdict": "warn"},
        {"verdict": "stop"},
    ],
)
def test_a_round_that_does_not_begin_there_is_left_alone(go_back, other):
    run, progress, before = go_back(1, **other)
    assert run is before and np.array_equal(progress.state.params["w"], [77.0, 77.0])


def test_a_checkpoint_that_is_gone_is_an_error(go_back):
    with pytest.raises(CheckpointError, match=r"end of round 1 is gone, but the guard has decided"):
        go_back(1, saved=())
