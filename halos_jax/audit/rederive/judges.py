"""Judges of a run that is checked: their answers on disk must do, and no question is asked."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from halos_jax.config import Config, RewardConfig
from halos_jax.config.rewards import PartConfig, ScorerConfig
from halos_jax.rewards.judge.scorer import CACHE_ONLY, find_cache

_Asked = TypeVar("_Asked", RewardConfig, PartConfig, ScorerConfig)


def answer_from_cache(config: Config, workdir: Path) -> Config:
    """Return a config whose judges answer from what they have said in the run in `workdir`."""

    def keep(one: _Asked) -> _Asked:
        cache = one.judge.cache or str(workdir / "judge.jsonl")
        url = CACHE_ONLY + one.judge.url.removeprefix(CACHE_ONLY)
        judge = dataclasses.replace(one.judge, url=url, key_variable="", cache=cache)
        return dataclasses.replace(one, judge=judge)

    reward = keep(config.reward)
    parts = {name: keep(part) for name, part in config.reward.parts.items()}
    scorers = {name: keep(one) for name, one in config.eval.scorers.items()}
    return dataclasses.replace(
        config,
        reward=dataclasses.replace(reward, parts=parts),
        eval=dataclasses.replace(config.eval, scorers=scorers),
    )


def list_rewards(config: Config) -> list[RewardConfig | PartConfig | ScorerConfig]:
    """Return the reward or, if it has parts, these, and the scorers of held-out samples."""
    parts: list[RewardConfig | PartConfig | ScorerConfig] = [*config.reward.parts.values()]
    return [*(parts or [config.reward]), *config.eval.scorers.values()]


def list_lost_caches(config: Config) -> list[Path]:
    """Return the files of judges' answers that the config names but that are not there."""
    judges = [one.judge for one in list_rewards(config) if one.kind == "judge"]
    caches = [Path(judge.cache) if judge.cache else find_cache(config) for judge in judges]
    return [path for path in dict.fromkeys(caches) if not path.exists()]
