"""What held-out and test samples are measured by, when, and what is kept of them."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from halos_jax.config import Config, EvalConfig, RewardConfig, RoundsConfig, SamplingConfig
from halos_jax.config.rewards import FeedbackConfig, JudgeConfig, PartConfig, ScorerConfig
from halos_jax.rounds import evaluation, stages
from halos_jax.rounds.budget import Budget
from halos_jax.signs.intervals import Z
from halos_jax.workdir.manifests import Manifest
from tests.rounds.stand_ins import CONFIG, PROMPTS, Calls, make_run, make_sample


@pytest.fixture
def sampled(monkeypatch):
    """Replace the sampler; return the list of what it was asked for."""
    asked = []

    def sample_shard(sampler, weights, prompts, *, seed, round, generator, logps_of, on_sample):
        ids, count = [one.prompt_id for one in prompts], sampler.settings.num_samples_per_prompt
        asked.append((ids, weights, seed, round, sampler.settings.temperature))
        lengths = range(1, 1 + count)
        return [make_sample(p, i - 1, i + int(p.prompt_id[1:])) for p in prompts for i in lengths]

    def make_sampler(settings, renderer, decoder, mesh):
        return SimpleNamespace(
            settings=settings,
            renderer=renderer,
            decoder=decoder,
            unstack=lambda params: f"for the test {params}",
        )

    monkeypatch.setattr(stages, "sample_shard", sample_shard)
    monkeypatch.setattr(evaluation, "make_sampler", make_sampler)
    return asked


def evaluate(run, folder, *, round=0, due=("eval",)):
    """Do the stage in the folder of a round; return its files and metrics."""
    folder = folder / "rounds" / f"{round:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    done = evaluation.evaluate_stage(run, "params", folder, due, round=round, step=9)
    return done.files, done.metrics


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_interval(name, value, error):
    return {name: value, f"{name}/low": value - Z * error, f"{name}/high": value + Z * error}


def with_wilson(name, share, count):
    """Return a share's metrics with Wilson's interval of `count` independent trials."""
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    ends = {"low": share + Z**2 / (2 * count) - half, "high": share + Z**2 / (2 * count) + half}
    return {name: share} | {f"{name}/{end}": at / (1 + Z**2 / count) for end, at in ends.items()}


def test_evaluation_draws_with_the_keys_of_round_0_and_keeps_its_metrics(tmp_path, sampled):
    # A rule may leave a sample out, too.
    scorers = {"short": lambda samples: [float(len(s.output) < 2) for s in samples[:3]] + [None]}
    for round in (0, 3):
        folder, writer = tmp_path / "rounds" / f"{round:04d}", Calls()
        sampled.clear()
        run = make_run(scorers=scorers, writer=writer, workdir=tmp_path)
        files, metrics = evaluate(run, tmp_path, round=round)
        assert sampled == [(["p0", "p1"], "unstacked params", 3, 0, 0.7)]
        # Rewards are 1 and 2 for one prompt, 2 and 3 for the other: residuals of -1 and 1.
        error = (2 * 2) ** 0.5 / 4
        expected = {
            **with_interval("reward_eval", 2.0, error),
            "unlabelled_eval": 0,
            # 1, 0 of the first, 0 of the second: residuals of 1/3 and -1/3.
            **with_interval("reward_eval/short", 1 / 3, (2 * 2 / 9) ** 0.5 / 3),
            "unlabelled_eval/short": 1,
            **with_interval("response_tokens_eval", 3.0, error),
            **with_wilson("truncated_eval", 0.0, 2),  # of two prompts that agree
        }
        if round:  # its samples are those of round 0
            expected |= with_wilson("win_rate_eval", 0.5, 2)
            expected |= with_wilson("win_rate_eval/short", 0.5, 2)
        assert metrics == pytest.approx(expected)
        rows = read(folder / "eval.jsonl")
        assert [row["reward"] for row in rows] == [1, 2, 2, 3]
        assert [row["scores"] for row in rows] == [{"short": one} for one in (1.0, 0, 0, None)]
        assert files == {"eval.jsonl": 4} | ({} if round else {"feedback.jsonl": 2})
        # On disk before the manifest can say so.
        assert writer.calls == [("write", 9, {"round": round, **metrics}), ("flush",)]


def test_a_held_out_sample_without_a_reward_is_counted(tmp_path, sampled):
    config = dataclasses.replace(CONFIG, reward=RewardConfig(max_unlabelled=0.25))
    run = make_run(scorer=lambda samples: [None, 2.0, 3.0, 4.0], config=config)
    _, metrics = evaluate(run, tmp_path)
    assert metrics["reward_eval"] == 3.0 and metrics["unlabelled_eval"] == 1
    rows = read(tmp_path / "rounds" / "0000" / "eval.jsonl")
    assert [row.get("reward") for row in rows] == [None, 2, 3, 4]
    assert not any("scores" in row for row in rows)


def test_a_later_round_is_compared_with_round_0_sample_by_sample(tmp_path, sampled):
    rewards = {0: [1.0, 2.0, 3.0, None], 4: [2.0, 2.0, 0.0, 9.0]}
    others = {0: [0.0, 0.0, 0.0, 0.0], 4: [1.0, 1.0, 1.0, -1.0]}
    config = dataclasses.replace(CONFIG, reward=RewardConfig(max_unlabelled=0.25))
    for round in (0, 4):
        run = make_run(
            scorer=lambda samples, round=round: rewards[round],
            scorers={"other": lambda samples, round=round: others[round]},
            config=config,
            workdir=tmp_path,
        )
        _, metrics = evaluate(run, tmp_path, round=round)
    # Won, tied and lost; the fourth cannot be compared. Residuals of 0.5 and -0.5 by prompt: a
    # standard error of 1/3, which 0.5 * 0.5 * 9 independent trials have.
    expected = with_wilson("win_rate_eval", 0.5, 2.25)
    # Two wins of one prompt, a win and a loss of the other: residuals of 0.5 and -0.5 of 4, an
    # error of 1/4, which 0.75 * 0.25 * 16 trials have.
    expected |= with_wilson("win_rate_eval/other", 0.75, 3)
    found = {name: one for name, one in metrics.items() if name.startswith("win_rate")}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reward", "scorer"),
    [
        (RewardConfig(parts={"a": PartConfig(normalise="file")}), ScorerConfig()),
        (RewardConfig(kind="judge", judge=JudgeConfig(mode="compare")), ScorerConfig()),
        (RewardConfig(), ScorerConfig(kind="judge", judge=JudgeConfig(mode="compare"))),
    ],
)
def test_scores_that_compare_one_policy_s_samples_have_no_win_rate(
    tmp_path, sampled, reward, scorer
):
    config = dataclasses.replace(CONFIG, reward=reward, eval=EvalConfig(scorers={"one": scorer}))
    run = make_run(config=config, scorers={"one": lambda samples: [1.0] * 4}, workdir=tmp_path)
    evaluate(run, tmp_path)
    _, metrics = evaluate(run, tmp_path, round=1)
    is_relative = scorer.kind == "judge"
    assert ("win_rate_eval" in metrics) == is_relative
    assert ("win_rate_eval/one" in metrics) == (not is_relative)


@pytest.mark.parametrize(
    ("held_out", "test", "expected"),
    [
        (PROMPTS[:2], [], [("eval",), (), ("eval",), (), ("eval",), ("eval",)]),
        (PROMPTS[:2], PROMPTS[2:3], [("eval", "test"), (), ("eval",), (), ("eval",), ("eval",)]),
        ([], PROMPTS[2:3], [("test",), (), (), (), (), ()]),
        ([], [], [()] * 6),
    ],
)
def test_every_kth_round_is_evaluated_and_round_0_and_the_last(held_out, test, expected):
    config = dataclasses.replace(CONFIG, rounds=RoundsConfig(eval_every=2))
    budget = Budget(total_prompts=10, prompts_per_round=2, num_skip=1)
    run = make_run(config=config, held_out=held_out, test=test, prompts=[None] * 20, budget=budget)
    manifests = [Manifest(0)] + [Manifest(n, start=2 * n - 1, stop=2 * n + 1) for n in range(1, 6)]
    assert [evaluation.list_due(run, one) for one in manifests] == expected
    # The order may end before the budget does.
    short = make_run(config=config, held_out=held_out, prompts=[None] * 7, budget=budget)
    assert bool(evaluation.list_due(short, manifests[3])) == bool(held_out)


def test_the_test_prompts_are_sampled_as_eval_says_and_compared_with_round_0(tmp_path, sampled):
    config = dataclasses.replace(CONFIG, eval=EvalConfig(test_temperature=0.0))
    run = make_run(config=config, test=PROMPTS[3:], workdir=tmp_path)
    files, metrics = evaluate(run, tmp_path, due=("eval", "test"))
    assert files == {"eval.jsonl": 4, "feedback.jsonl": 2, "test.jsonl": 2}
    assert sampled == [
        (["p0", "p1"], "unstacked params", 3, 0, 0.7),
        (["p3", "p4"], "for the test params", 3, 0, 0.0),
    ]
    # One greedy answer each, of 4 and 5 characters, which the limit has cut.
    assert metrics["reward_test"] == 4.5 and metrics["truncated_test"] == 1.0
    assert metrics["reward_eval"] == 2.0 and "win_rate_test" not in metrics
    folder = tmp_path / "rounds" / "0004"
    folder.mkdir()
    run.writer.calls.clear()
    better = make_run(
        config=config,
        test=PROMPTS[3:],
        workdir=tmp_path,
        scorer=lambda samples: [5.0, 5.0],
        writer=run.writer,
    )
    files, metrics, _ = evaluation.final_test_stage(better, "last", folder, round=4, step=20)
    assert files == {"test.jsonl": 2} and sampled[-1][1] == "for the test last"
    assert (metrics["reward_test"], metrics["win_rate_test"]) == (5.0, 0.75)
    assert run.writer.calls == [("write", 20, {"round": 4, **metrics}), ("flush",)]
    assert [row["reward"] for row in read(folder / "test.jsonl")] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0.7, 4)),
        ({"test_temperature": 0.0}, (0.0, 1)),
        ({"test_temperature": 0.0, "test_samples": 1}, (0.0, 1)),
        ({"test_samples": 2}, (0.7, 2)),
        ({"test_temperature": 1.0}, (1.0, 4)),
    ],
)
def test_the_test_is_sampled_as_the_rest_unless_eval_says_otherwise(changes, expected):
    config = Config(sampling=SamplingConfig(top_k=5), eval=EvalConfig(**changes))
    found = evaluation.choose_test_sampling(config)
    assert (found.temperature, found.num_samples_per_prompt) == expected
    assert found == dataclasses.replace(
        config.sampling, temperature=expected[0], num_samples_per_prompt=expected[1]
    )


@pytest.mark.parametrize(("heat", "asked"), [(0.7, "auto"), (1.0, "auto"), (0.7, False)])
def test_the_test_is_drawn_as_the_rounds_samples_are(sampled, heat, asked):
    config = dataclasses.replace(
        CONFIG,
        loss={"name": "dapo"},
        feedback=FeedbackConfig(type="scalar"),
        sampling=SamplingConfig(temperature=heat, top_p=1.0, exact_ratios=asked),
        eval=EvalConfig(test_temperature=0.9),
    )
    found = evaluation.make_test_rollouts(make_run(config=config, test=PROMPTS[3:]).rollouts)
    assert found.sampler.settings.exact_ratios is (heat == 0.7 and asked == "auto")


def test_round_0_is_read_once_however_many_rounds_are_compared_with_it(
    tmp_path, sampled, monkeypatch
):
    run, reads, read = make_run(workdir=tmp_path), [], evaluation.reading.read_records
    evaluate(run, tmp_path)

    def note(path):
        reads.extend([path.name] if path.name == "eval.jsonl" else [])  # no shards
        return read(path)

    monkeypatch.setattr(evaluation.reading, "read_records", note)
    for round in (1, 2):
        assert evaluate(run, tmp_path, round=round)[1]["win_rate_eval"] == 0.5
    assert reads == ["eval.jsonl"]
    better = make_run(workdir=tmp_path, scorer=lambda samples: [9.0] * 4)
    assert evaluate(better, tmp_path, round=3)[1]["win_rate_eval"] == 1.0
    evaluate(better, tmp_path)  # round 0 again, with other rewards
    assert evaluate(better, tmp_path, round=4)[1]["win_rate_eval"] == 0.5
    assert reads == ["eval.jsonl"] * 2
