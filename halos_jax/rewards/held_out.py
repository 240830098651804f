"""The rewards that held-out samples get besides the one that is trained on: for metrics alone.

They are the functions of `reward.rules` and the rewards of `eval.scorers`.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from halos_jax.config import Config, RewardConfig
from halos_jax.config.tasks import TASKS
from halos_jax.data.chat.renderer import Renderer
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rewards.function_scorer import check_records, make_rules
from halos_jax.rewards.labels import Labels, Scorer, label_samples
from halos_jax.rewards.parts import name_fields, part_to_reward
from halos_jax.rewards.scorers import make_scorer
from halos_jax.types import Prompt, Sample


def list_scorers(config: Config) -> dict[str, Config]:
    """Map each name of `eval.scorers` to a config whose reward it is; empty if the task has no use.

    It takes nothing from `reward` but `max_unlabelled`.
    """
    if not TASKS[config.task].watches:
        return {}
    settings = RewardConfig(max_unlabelled=config.reward.max_unlabelled)
    return {
        name: dataclasses.replace(config, reward=part_to_reward(one, settings))
        for name, one in config.eval.scorers.items()
    }


def make_scorers(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    check: Callable[[], None] = lambda: None,
    layouts: LayoutMemory | None = None,
) -> dict[str, Scorer]:
    """Return the scorers of `reward.rules` and `eval.scorers` by name; arguments as `make_scorer`.

    Raises:
      ConfigError, RewardError, ModelError: if one cannot be made; the message names its field.
    """
    made: dict[str, Scorer] = dict(make_rules(config.reward))
    for name, alone in list_scorers(config).items():
        with name_fields(_prefix(name)):
            scorer = make_scorer(alone, mesh, renderer, check, layouts, f"scorer {name}")
        made[name] = _limit(name, scorer, alone.reward)
    return made


def _limit(name: str, scorer: Scorer, settings: RewardConfig) -> Scorer:
    """Return the scorer so that it raises an error if too many samples have no score."""

    def score(samples: Sequence[Sample]) -> Labels:
        with name_fields(_prefix(name)):
            return label_samples(scorer, samples, settings)

    return score


def check_held_out(config: Config, prompts: list[Prompt], *, skip: bool = False) -> list[Prompt]:
    """Return the held-out prompts whose records have what the reward and the scorers need.

    Arguments and errors are those of `check_records`.
    """
    kept = check_records(config.reward, prompts, skip=skip)
    for name, alone in list_scorers(config).items():
        with name_fields(_prefix(name)):
            kept = check_records(alone.reward, kept, skip=skip)
    return kept


def find_relative(config: Config) -> set[str]:
    """Return the names of the scorers whose scores compare samples of one policy alone.

    "" stands for the reward. Such scores say nothing of one policy against another: those that are
    normalised over a file or a prompt, and those of a judge that compares a prompt's samples.
    """
    rewards = {"": config.reward} | {
        name: alone.reward for name, alone in list_scorers(config).items()
    }
    return {name for name, reward in rewards.items() if _is_relative(reward)}


def _is_relative(reward: RewardConfig) -> bool:
    parts = [reward, *(part_to_reward(part, reward) for part in reward.parts.values())]
    used = parts[1:] or parts
    normalised = any(part.normalise != "none" for part in reward.parts.values())
    return normalised or any(one.kind == "judge" and one.judge.mode == "compare" for one in used)


def _prefix(name: str) -> str:
    return f"eval.scorers.{name}."
