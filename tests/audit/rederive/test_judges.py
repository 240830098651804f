"""Judges answer from their files."""

from pathlib import Path

from halos_jax.audit.rederive.judges import answer_from_cache, list_lost_caches, list_rewards
from halos_jax.config import Config, EvalConfig, RewardConfig
from halos_jax.config.rewards import JudgeConfig, PartConfig, ScorerConfig
from halos_jax.rewards.judge.scorer import CACHE_ONLY

JUDGE = JudgeConfig(url="http://host", key_variable="KEY")
CONFIG = Config(
    workdir="elsewhere",
    reward=RewardConfig(
        kind="judge",
        judge=JUDGE,
        parts={"nice": PartConfig(kind="judge", judge=JudgeConfig(cache="nice.jsonl"))},
    ),
    eval=EvalConfig(scorers={"other": ScorerConfig(kind="judge", judge=JUDGE)}),
)


def test_no_judge_is_asked_and_no_key_is_needed(tmp_path):
    found = answer_from_cache(CONFIG, tmp_path)
    judges = [found.reward.judge, found.reward.parts["nice"].judge]
    judges.append(found.eval.scorers["other"].judge)
    urls = [CACHE_ONLY + one for one in ("http://host", JudgeConfig().url, "http://host")]
    assert [(one.url, one.key_variable) for one in judges] == [(url, "") for url in urls]
    own = str(tmp_path / "judge.jsonl")
    assert [one.cache for one in judges] == [own, "nice.jsonl", own]


def test_answers_that_are_gone_are_named(tmp_path):
    found = answer_from_cache(CONFIG, tmp_path)
    assert list_lost_caches(found) == [Path("nice.jsonl"), tmp_path / "judge.jsonl"]
    (tmp_path / "judge.jsonl").touch()
    assert list_lost_caches(found) == [Path("nice.jsonl")]


def test_parts_stand_in_the_place_of_the_reward():
    assert list_rewards(CONFIG) == [CONFIG.reward.parts["nice"], CONFIG.eval.scorers["other"]]
    assert list_rewards(Config()) == [Config().reward]
