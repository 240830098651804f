"""The rewards that held-out samples get besides the one that is trained on: for metrics alone.

They are the functions of `reward.rules` and the rewards of `eval.scorers`.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from jax.sharding import Mesh

from halos_jax.config import Config, ConfigError, RewardConfig
from halos_jax.config.rewards import JudgeConfig
from halos_jax.config.tasks import TASKS
from halos_jax.data.chat.renderer import Renderer
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rewards.function_scorer import check_records, make_rules
from halos_jax.rewards.labels import Labels, Scorer, gives_rewards, label_samples
from halos_jax.rewards.parts import name_fields, part_to_reward
from halos_jax.rewards.scorers import make_scorer
from halos_jax.types import Prompt, Sample

logger = logging.getLogger(__name__)

_WHY = "only compares samples of one policy, so that its mean is the same for every policy"
_NONE = "is none, since reward.kind='none' scores no sample"


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
    return normalised or any(_compares(one.kind, one.judge) for one in used)


def has_fixed_mean(reward: RewardConfig) -> bool:
    """Tell whether the mean reward is the same for every policy, so that no round can be chosen
    by it: if each part is normalised, or is of a judge that compares a prompt's samples; or if
    there is no reward."""
    parts = list(reward.parts.values())
    if parts:
        return all(part.normalise != "none" or _compares(part.kind, part.judge) for part in parts)
    return not gives_rewards(reward) or _compares(reward.kind, reward.judge)


def check_means(config: Config, *, is_watched: bool) -> None:
    """Refuse to choose or judge rounds by a mean that cannot change; warn if there is one.

    Args:
      is_watched: whether there are held-out prompts.

    Raises:
      ConfigError: naming the field that asks for it.
    """
    wanted = {
        "rounds.keep_best": config.rounds.keep_best is True,
        "guard.action": config.guard.action == "retry",
    }
    chosen = [path for path, is_wanted in wanted.items() if is_wanted]
    why = _WHY if gives_rewards(config.reward) else _NONE
    if chosen and has_fixed_mean(config.reward):
        raise ConfigError(
            f"{chosen[0]}: the best round is that of the highest held-out reward, but this reward "
            f"{why}; allowed: a reward with a part that is not normalised and no comparison, or "
            "rounds.keep_best='auto' with guard.action='warn' or 'stop'"
        )
    scorer = list_scorers(config).get(config.guard.scorer)
    if scorer is not None and has_fixed_mean(scorer.reward):
        raise ConfigError(
            f"guard.scorer: got {config.guard.scorer!r}, which {_WHY}: its mean would never fall; "
            "allowed: a scorer that judges each sample by itself"
        )
    if is_watched and has_fixed_mean(config.reward):
        logger.warning(
            "the reward %s: by reward_eval no round is the best, and none falls; watch the rounds "
            "by eval.scorers",
            why,
        )


def name_scorer(name: str) -> AbstractContextManager[None]:
    """Call the fields of `reward` by those of a scorer in errors; "" is the reward itself."""
    return name_fields(_prefix(name)) if name else nullcontext()


def _compares(kind: str, judge: JudgeConfig) -> bool:
    return kind == "judge" and judge.mode == "compare"


def _prefix(name: str) -> str:
    return f"eval.scorers.{name}."
