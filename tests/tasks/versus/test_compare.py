"""`task=compare`: two files of samples, scored, paired and compared."""

import dataclasses
import json
import re

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    RewardConfig,
    SamplingConfig,
)
from halos_jax.config.rewards import JudgeConfig, ScorerConfig
from halos_jax.config.schema import flatten, to_plain
from halos_jax.data.records.fields import RecordError
from halos_jax.rewards.judge import scorer as judging
from halos_jax.rewards.judge.scorer import count_wins, list_pairs
from halos_jax.tasks.preflight import check_start
from halos_jax.tasks.versus import compare
from halos_jax.tasks.versus.compare import run_comparison
from halos_jax.workdir.interrupt import Interrupted, StopSignal

LENGTH = "tests.tasks.test_label:score_letters"
FIRST = {"abc": ["abc", "a"], "de": ["d"], "only here": ["x"]}
SECOND = {"de": ["de", "ed"], "abc": ["ab", "b"]}


def write(path, answers) -> str:
    rows = [
        {"prompt_id": question, "sample_id": number, "instruction": question, "output": text}
        for question, texts in answers.items()
        for number, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def make_config(folder, **changes) -> Config:
    config = Config(
        task="compare",
        workdir=str(folder / "run"),
        progress=False,
        reward=RewardConfig(kind="function", function=LENGTH),
        data=DataConfig(eval=write(folder / "first.json", FIRST)),
        eval=EvalConfig(second_samples=write(folder / "second.json", SECOND)),
        sampling=SamplingConfig(shard_prompts=1),
    )
    return dataclasses.replace(config, **changes)


def test_what_the_task_would_refuse_is_found_by_a_check(tmp_path):
    config = make_config(tmp_path)
    check_start(config, with_data=True)
    (tmp_path / "second.json").write_text('[{"output": "x"}]')
    with pytest.raises(ConfigError, match=r"second\.json line 1: field"):
        check_start(config, with_data=True)


def test_the_samples_of_a_prompt_meet_and_the_rest_is_counted(tmp_path, caplog):
    metrics = run_comparison(make_config(tmp_path), StopSignal())
    # 3 against 2 and 1 against 1 of one prompt, 1 against 2 of the other.
    assert metrics["win_rate_eval"] == 0.5 and metrics["pairs_eval"] == 3
    assert metrics["reward_eval"] == metrics["reward_against"] == pytest.approx(5 / 3)
    assert (metrics["unpaired_first"], metrics["unpaired_first_prompts"]) == (1, 1)
    assert metrics["unpaired_second"] == 1 and "unpaired_second_prompts" not in metrics
    assert "1 of 4 samples of" in caplog.text and "1 of 4 of" in caplog.text
    record = json.loads((tmp_path / "run" / "comparison.json").read_text())
    reward = record["reward"]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (1, 1, 1)
    assert record["length"]["unit"] == "characters" and record["prompts"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").open()]
    assert [row["outputs"] for row in rows] == [["abc", "ab"], ["a", "b"], ["d", "de"]]
    assert [row["rewards"] for row in rows] == [[3.0, 2.0], [1.0, 1.0], [1.0, 2.0]]
    assert not list((tmp_path / "run").glob("*.shard-*"))
    assert run_comparison(make_config(tmp_path), StopSignal()) == metrics


def test_a_judge_of_pairs_is_shown_each_pair_alone(tmp_path, monkeypatch):
    asked = []

    def make(config, check, is_known):
        def score(samples):
            asked.extend(one.output for one in samples)
            longer = {
                (i, j): 0.5
                if len(samples[i].output) == len(samples[j].output)
                else float(len(samples[i].output) > len(samples[j].output))
                for i, j in list_pairs(samples, "all")
            }
            return count_wins(len(samples), longer)

        return score

    monkeypatch.setattr("halos_jax.rewards.scorers.make_judge_scorer", make)
    judge = ScorerConfig(kind="judge", judge=JudgeConfig(mode="compare", model="m"))
    config = make_config(tmp_path, reward=RewardConfig(kind="none"))
    scorers = {"judge": judge, "length": ScorerConfig(kind="function", function=LENGTH)}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, scorers=scorers))
    metrics = run_comparison(config, StopSignal())
    assert asked == ["abc", "ab", "a", "b", "d", "de"]
    assert metrics["win_rate_eval/judge"] == metrics["win_rate_eval/length"] == 0.5
    assert "win_rate_eval" not in metrics and judging.make_judge_scorer is not make
    rows = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").open()]
    assert rows[0]["scores"] == {"length": [3.0, 2.0], "judge": [1.0, 0.0]}


def test_scores_are_kept_when_it_is_stopped(tmp_path):
    stop, config = StopSignal(), make_config(tmp_path)
    calls = []

    def score_once(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            stop.handle()
        return score(*given, **named)

    score = compare.scoring.write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.scoring, "write_shard", score_once)
        with pytest.raises(Interrupted):
            run_comparison(config, stop)
        kept = len(list((tmp_path / "run").glob("scores-0-*.shard-*")))
        assert kept == 2
        run_comparison(config, StopSignal())
    assert len(calls) == 5  # three prompts of one file, two of the other


def test_files_without_a_common_prompt_are_refused(tmp_path):
    config = make_config(tmp_path)
    other = EvalConfig(second_samples=write(tmp_path / "third.json", {"zzz": ["z"]}))
    with pytest.raises(RecordError, match=r"third\.json: none of its 1 samples is of a prompt of"):
        run_comparison(dataclasses.replace(config, eval=other), StopSignal())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"eval": EvalConfig(against="sft")}, r"eval\.against: .* compared by task='eval'"),
        ({"data": DataConfig(max_eval=3)}, r"data\.max_eval: got 3, .* 0; all samples"),
        ({"reward": RewardConfig(kind="none")}, r"reward\.kind: got 'none', but there is nothing"),
    ],
)
def test_what_it_does_not_use_is_refused(changes, line):
    values = dict(flatten(to_plain(Config(task="compare", **changes))))
    (found,) = compare.check_compare(values)
    assert re.match(line, found)
