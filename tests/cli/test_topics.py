"""What there is to choose from, by topic."""

import re

from halos_jax import losses
from halos_jax.cli.presets import list_presets
from halos_jax.cli.topics import EXIT_CODES, TOPICS, describe_topic
from halos_jax.config.kinds import FEEDBACK_TYPES, REWARD_KINDS
from halos_jax.data.records.hub import HUB_SETS
from halos_jax.workdir import interrupt


def test_every_loss_is_listed_with_its_hyperparameters():
    shown = describe_topic("losses")
    for name in losses.list_losses():
        assert re.search(rf"^  {re.escape(name)}( \(|$)", shown, re.MULTILINE), name
    assert "\n  dpo (beta=0.1)\n      Direct preference optimisation (Rafailov" in shown
    assert "\n  gkd (beta=0.5, temperature=1.0)\n      Generalised knowledge distill" in shown
    assert "\non pairs of a better and a worse answer (from feedback: pairwise)\n" in shown


def test_every_kind_of_reward_and_every_ready_function_is_listed():
    shown = describe_topic("rewards")
    assert all(f"\n  {kind}" in shown for kind in REWARD_KINDS)
    assert "\n  model (needs reward.path)\n" in shown
    assert "\n  numeric_answer (field='answer', tolerance=1e-06)\n" in shown
    assert all(name in shown for name in FEEDBACK_TYPES)


def test_every_preset_and_every_named_data_set_is_listed():
    assert all(f"\n  {name} " in describe_topic("presets") for name in list_presets())
    shown = describe_topic("data")
    assert all(f"\n  {name}@{{" in shown for name in HUB_SETS)
    assert "\n  shp@{train,validation,test}\n" in shown


def test_no_topic_is_wider_than_a_terminal():
    for name in TOPICS:
        assert max(map(len, describe_topic(name).splitlines())) <= 110, name


def test_the_exit_codes_are_those_of_the_program():
    assert list(EXIT_CODES) == [0, 1, interrupt.EXIT_CODE, interrupt.ABORTED]


def test_fields_that_may_change_on_a_resume_are_listed_by_what_they_do():
    told = describe_topic("resume")
    parts = told.split("\n\n")
    by_head = {part.splitlines()[0]: part.splitlines()[1:] for part in parts[1:-1]}
    assert "  mesh.*" in by_head["how it is computed; results may differ in their last bits"]
    tuned = by_head["the optimizer and the guard, from there on"]
    assert "  export.dtype (but not with task export)" in tuned
    assert "  optimizer.learning_rate" in tuned and "  guard.*" in tuned
    grows = by_head["to more, and the run goes on"]
    assert "  rounds.total_prompts (task online)" in grows
    assert "  checkpoint.*" in by_head["what no result depends on"]
    assert "model.path" not in told and "seed" not in told.replace("verify.seed", "")
