"""Every preset gives a valid config, alone or with the paths that its docstring asks for."""

import importlib.util
from pathlib import Path

import pytest

from halos_jax.cli.overrides import apply_overrides
from halos_jax.config import freeze
from halos_jax.course.rates import check_rate
from halos_jax.losses import check_feedback, check_loss, get_loss

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
PATHS = [("model.path", "m"), ("reward.path", "r"), ("data.train", "t"), ("data.eval", "e")]
PATHS += [("reward.judge.model", "j")]


# Preset -> arguments that it chooses by; of all others without one, the argument is a folder.
CHOICES = {"align": ("dpo", "kto")}
CASES = [(path, one) for path in PRESETS for one in CHOICES.get(path.stem, ("folder",))]


@pytest.mark.parametrize("path, argument", CASES, ids=lambda one: getattr(one, "stem", one))
def test_preset_is_valid_and_documented(path, argument):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "Command:" in module.__doc__ and "Hardware:" in module.__doc__
    takes_argument = module.get_config.__code__.co_argcount
    config = module.get_config(*[argument] * takes_argument)
    if config.task != "pipeline":
        paths = [one for one in PATHS if one[0] != "data.eval" or not config.data.holdout]
        paths += [("model.teacher", "t")] if get_loss(config.loss.to_dict()).divergence else []
        assert not apply_overrides(config, paths)
    frozen = freeze(config, checks=[lambda frozen: check_loss(frozen.loss)])
    assert check_rate(frozen, None) == check_rate(frozen, 500_000_000) == ""
    if frozen.task == "online":
        keep_logps = frozen.sampling.keep_logps
        assert not check_feedback(frozen.loss, frozen.feedback.type, keep_logps=keep_logps)
