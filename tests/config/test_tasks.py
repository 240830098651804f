"""The tables of tasks and modes."""

import dataclasses
import typing

import pytest

from halos_jax.config import Config, EvalConfig, SamplingConfig, schema
from halos_jax.config.tasks import (
    MODES,
    PIPELINE_TASKS,
    TASKS,
    Mode,
    Task,
    TaskSpec,
    is_scored,
    load,
)


def test_every_name_has_its_row():
    assert tuple(TASKS) == typing.get_args(Task)
    assert tuple(MODES) == typing.get_args(Mode)
    assert tuple(TASKS)[:-1] == PIPELINE_TASKS
    assert all(row.summary for row in (*TASKS.values(), *MODES.values()))


def test_the_functions_that_the_tables_name_exist():
    named = [
        value
        for row in (*TASKS.values(), *MODES.values())
        for field in dataclasses.fields(row)
        if isinstance(value := getattr(row, field.name), str) and ":" in value
    ]
    assert len(named) >= 18
    for name in named:
        assert callable(load(name)), name


def test_the_fields_that_the_tables_name_exist():
    known = set(schema.leaf_types(Config))
    for row in TASKS.values():
        conditions = [row.scored_if[0]] if isinstance(row.scored_if, tuple) else []
        assert {*row.needs, *row.divides, row.data, *conditions} <= known
        assert all(
            name in known or any(path.startswith(f"{name}.") for path in known)
            for name in row.reads
        )


def test_what_asks_for_rewards():
    samples, loss = EvalConfig(on="samples"), EvalConfig(on="feedback")
    best = SamplingConfig(best_of=True)
    asked = {
        name
        for name, config in {
            **{task: Config(task=task, eval=loss) for task in TASKS},
            "eval of samples": Config(task="eval", eval=samples),
            "best of": Config(task="sample", sampling=best),
        }.items()
        if is_scored(config)
    }
    assert asked == {"online", "label", "compare", "eval of samples", "best of"}


@pytest.mark.parametrize(
    ("fact", "tasks"),
    [
        ("trains", {"online", "sft", "reward_model", "align"}),
        ("samples", {"online", "sample", "eval"}),
        ("makes_feedback", {"online", "label"}),
        ("has_reference", {"online", "align"}),
        ("keeps_prompts", {"label", "compare"}),
    ],
)
def test_the_tasks_of_which_a_fact_holds(fact, tasks):
    assert {name for name, row in TASKS.items() if getattr(row, fact)} == tasks


def test_a_mode_that_a_task_does_not_have_is_refused(monkeypatch):
    from halos_jax.config import limits

    monkeypatch.setitem(TASKS, "bench", TaskSpec("", modes=("run",), on_mesh=False))
    values = dict(schema.flatten(schema.to_plain(Config(task="bench", mode="check"))))
    assert list(limits.find_violations(values)) == [
        "mode: got 'check', allowed with task='bench': 'run'"
    ]
