"""What the stages of a round share."""

import dataclasses

import pytest

from halos_jax.config import CheckpointConfig
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.context import NOTHING, Rollouts, StageResult
from tests.rounds.stand_ins import CONFIG, PROMPTS, make_run, make_sample


def test_a_run_counts_the_rounds_that_have_prompts():
    run = make_run(prompts=PROMPTS, budget=Budget(total_prompts=8, prompts_per_round=2))
    assert len(PROMPTS) == 5 and run.num_rounds == 3


def test_what_a_run_saves_with_is_the_runs_own():
    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(every=7))
    run = make_run(config=config)
    found = (run.saver.checkpoints, run.saver.writer, run.saver.stop, run.saver.every)
    assert found == (run.checkpoints, run.writer, run.stop, 7)


def test_a_task_that_only_samples_has_no_reward():
    run = make_run()
    rollouts = Rollouts(run.workspace, run.rollouts.sampler)
    with pytest.raises(RuntimeError, match="no reward was made to score 1 samples"):
        rollouts.scorer([make_sample(PROMPTS[0], 0, 1)])


def test_a_result_is_unpacked_as_files_metrics_and_decisions():
    files, metrics, decisions = StageResult({"a.jsonl": 2}, {"reward": 0.5})
    assert (files, metrics, decisions) == ({"a.jsonl": 2}, {"reward": 0.5}, {})
    assert NOTHING == ({}, {}, {})
