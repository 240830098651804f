"""Two sets of samples, compared and written down."""

import json

import pytest

from halos_jax.config import RewardConfig
from halos_jax.data.records.fields import RecordError
from halos_jax.rounds.outcome import comparison
from halos_jax.rounds.outcome.comparison import Relative, Side, write_comparison
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_sample, make_workspace

ONES = [make_sample(prompt, number, 2) for prompt in PROMPTS[:3] for number in range(2)]
TWOS = [make_sample(prompt, 0, 1) for prompt in PROMPTS[1:4]]


def compare(folder, **relative):
    sides = [
        Side({"name": "a"}, ONES, {"": [1.0, 9.0, 2.0, 9.0, None, 9.0], "rule": [0.0] * 6}),
        Side({"name": "b"}, TWOS, {"": [1.0, 1.0, 9.0], "rule": [0.0, 1.0, 9.0]}),
    ]
    done = write_comparison(make_workspace(folder), *sides, relative)
    return done, json.loads((folder / "comparison.json").read_text())


def test_scores_are_those_of_the_samples_that_meet(tmp_path, caplog):
    caplog.set_level("INFO")
    done, record = compare(tmp_path)
    assert dict(done.files) == {"pairs.jsonl": 2, "comparison.json": 1}
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert [row["rewards"] for row in rows] == [[2.0, 1.0], [None, 1.0]]
    assert [row["scores"]["rule"] for row in rows] == [[0.0, 0.0], [0.0, 1.0]]
    assert record["unpaired"] == {
        "first": 4,
        "second": 1,
        "first_prompts": 1,
        "second_prompts": 1,
    }
    metrics = done.metrics
    assert (metrics["win_rate_eval"], metrics["unscored_eval"]) == (1.0, 1)
    assert (metrics["win_rate_eval/rule"], metrics["reward_gain/rule"]) == (0.25, -0.5)
    assert "win_rate_eval/low" in metrics and "reward_gain/low" not in metrics  # one prompt
    assert record["length"] == {
        "unit": "tokens",
        "first": {"value": 3.0, "low": 3.0, "high": 3.0},
        "second": {"value": 2.0, "low": 2.0, "high": 2.0},
        "gain": {"value": 1.0, "low": 1.0, "high": 1.0},
    }
    table = comparison.format_comparison(record)
    assert table in caplog.text and max(map(len, table.splitlines())) <= 100
    assert table.splitlines()[0] == "first: a; second: b"
    for text in ("2 pairs of 2 prompts; length 3.0 and 2.0 tokens", "rule", "unscored", "-0.500"):
        assert text in table
    assert "4 of 6 samples of a and 1 of 3 of b have no partner" in caplog.text


def test_a_reward_that_compares_is_asked_of_the_pairs(tmp_path):
    def score(samples):
        assert [len(one.output) for one in samples] == [2, 1, 2, 1]
        return [1.0, 0.0, 0.5, 0.5]

    judge = Relative(score, CONFIG, ONES, TWOS)
    assert CONFIG.reward == RewardConfig()
    done, record = compare(tmp_path, judge=judge)
    assert record["scorers"]["judge"]["wins"] == record["scorers"]["judge"]["ties"] == 1
    assert done.metrics["win_rate_eval/judge"] == 0.75


def test_sets_without_a_common_prompt_are_refused():
    with pytest.raises(RecordError, match="b: none of its 3 samples is of a prompt of a"):
        comparison.pair_named(("a", ONES[:2]), ("b", TWOS))
