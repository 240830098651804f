"""What a run is made of; whole runs are in tests/tasks and tests/e2e."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from halos_jax.config import Config, RoundsConfig, TrainConfig
from halos_jax.rounds import setup
from halos_jax.workdir import workspace as workspaces
from halos_jax.workdir.interrupt import StopSignal
from tests.tasks.test_online import make_config


@pytest.mark.parametrize(("rounds_done", "is_trained"), [(1, False), (2, True)])
def test_a_run_is_made_of_what_the_config_and_its_position_say(
    toy, tmp_path, monkeypatch, caplog, rounds_done, is_trained
):
    caplog.set_level(logging.INFO)
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def call(*given, **options):
            seen[name] = given, options
            return original(*given, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (setup.training, "make_trainer"),
        (setup, "make_scorer"),
        (setup, "require_room"),
        (workspaces, "MetricWriter"),
    ):
        spy(module, name)
    restore = setup.restore_progress

    def restore_progress(*given):
        found = restore(*given)
        found.state, found.round = found.state.replace(step=7), rounds_done
        return found

    monkeypatch.setattr(setup, "restore_progress", restore_progress)
    monkeypatch.setattr(setup, "rewind", lambda *given, **options: None)
    config = make_config(
        toy,
        tmp_path,
        rounds=RoundsConfig(total_prompts=6, prompts_per_round=3, num_skip=2),
        train=TrainConfig(batch_size=2, max_length=16, row_multiple=64, epochs=2),
    )
    stop = StopSignal()
    with workspaces.open_workspace(config, stop) as workspace:
        run, progress = setup.make_run(workspace)
        run.checkpoints.close()
        run.writer.close()
    # Two rounds of two passes over three pairs in steps of two: two steps a pass, and not one.
    assert seen["make_trainer"][1]["total_steps"] == 2 * 2 * 2
    assert "at most 3 pairs and 4 optimizer steps a round, 6 pairs and 8 steps" in caplog.text
    assert seen["make_scorer"][0][3:] == (stop.check, run.layouts)
    assert seen["MetricWriter"][1]["resume_step"] == progress.state.step == 7
    assert seen["require_room"] == (
        (tmp_path, run.trainer.abstract_state),
        {"is_trained": is_trained, "checkpoints": 1},
    )
    budget = run.budget
    assert (budget.total_prompts, budget.prompts_per_round, budget.num_skip) == (6, 3, 2)


@pytest.mark.parametrize("newest_is_whole", [True, False])
def test_what_lies_ahead_is_laid_out_from_where_the_run_really_goes_on(
    monkeypatch, newest_is_whole
):
    places = {"restored": False}

    def find_place(_):
        behind = places["restored"] and not newest_is_whole
        return {"round": 2, "step": 3} if behind else {"round": 3, "step": 6}

    def restore_progress(trainer, *_):
        trainer.layouts.append("restored")
        places["restored"] = True
        return SimpleNamespace(round=1 if not newest_is_whole else 2)

    bases = []

    def load_frozen(policy, mesh):
        bases.append(mesh)
        return "base"

    def make_trainer(workspace, policy, frozen, teacher, steps):
        assert (frozen, teacher) == ("base", None)
        return loop_like(steps=steps, layouts=[])

    loop_like = dataclasses.make_dataclass("Trainer", ["steps", "layouts"])
    monkeypatch.setattr(setup, "find_place", find_place)
    monkeypatch.setattr(setup, "restore_progress", restore_progress)
    monkeypatch.setattr(setup, "load_frozen", load_frozen)
    monkeypatch.setattr(setup, "make_run_trainer", make_trainer)
    workspace = SimpleNamespace(
        config=Config(),
        mesh="mesh",
        with_config=lambda config: SimpleNamespace(config=config),
    )
    laid_out, trainer, _ = setup._restore(
        workspace, None, None, lambda place: (f"from {place['round']}", 100 * place["round"])
    )
    assert laid_out.config == ("from 3" if newest_is_whole else "from 2")
    assert trainer.steps == (300 if newest_is_whole else 200)
    assert trainer.layouts == ["restored"], "what the checkpoint holds of the shapes is kept"
    assert bases == ["mesh"], "a device has no room for two"
