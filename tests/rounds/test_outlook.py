import dataclasses
import json
import logging
from pathlib import Path

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    FeedbackConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.config.rewards import JudgeConfig
from halos_jax.course.advice import RoundSigns
from halos_jax.rounds import outlook
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.order import Order, load_order, save_order
from halos_jax.types import Prompt, Turn
from halos_jax.workdir import manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.manifests import Manifest, round_folder

# 3 samples of a prompt, of which "binary" makes 3 examples; 4 of these in a step.
CONFIG = Config(
    rounds=RoundsConfig(total_prompts=20, prompts_per_round=8),
    feedback=FeedbackConfig(type="binary"),
    sampling=SamplingConfig(num_samples_per_prompt=3),
    train=TrainConfig(batch_size=4),
    optimizer=OptimizerConfig(schedule="linear", warmup_fraction=0.5),
    loss={"name": "kto"},
)


def make_order(*groups):
    prompts = [Prompt(f"p{n}", (Turn("user", f"q{n}"),)) for n in range(sum(groups))]
    return Order(prompts, groups, is_new=False)


def lay_out(config, order, history=None, opened=()):
    rounds = config.rounds
    budget = Budget(rounds.total_prompts, rounds.prompts_per_round, rounds.num_skip, opened)
    history = history or History(config)
    return outlook.lay_out(config, history, budget, len(order.prompts), order)


def test_the_schedule_counts_the_rounds_that_have_prompts(caplog):
    """Rounds of 8, 8 and 4 prompts: 24, 24 and 12 examples in steps of 4."""
    assert lay_out(CONFIG, make_order(100)) == (CONFIG, 6 + 6 + 3)
    assert not caplog.records
    assert lay_out(CONFIG, make_order(10)) == (CONFIG, 6 + 2)  # 6 examples are 2 steps of 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "data.train: 10 prompts are enough for 2 of 3 rounds" in record.message
    assert "rounds.total_prompts=20" in record.message
    two = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=4, epochs=2))
    assert lay_out(two, make_order(100))[1] == 2 * 15


def test_no_prompt_for_any_round_is_an_error():
    rounds = dataclasses.replace(CONFIG.rounds, num_skip=10)
    with pytest.raises(ConfigError, match=r"rounds\.num_skip: got 10, but data\.train has 10"):
        lay_out(dataclasses.replace(CONFIG, rounds=rounds), make_order(10))


def test_more_of_a_run_keeps_the_warm_up_of_its_start(caplog):
    caplog.set_level(logging.INFO)
    segments = ({"round": 4, "step": 15, "changed": {"rounds.total_prompts": [20, 36]}},)
    more = dataclasses.replace(CONFIG, rounds=dataclasses.replace(CONFIG.rounds, total_prompts=36))
    done = ((0, 8), (8, 16), (16, 20))
    found, steps = lay_out(more, make_order(100), History(more, segments=segments), done)
    assert steps == 15 + 6 + 6
    assert found.optimizer.warmup_steps == 8  # half of the 15 of its start, rounded to even
    assert "laid out for 27 steps from here on, 15 at the start; its warm-up stays 8" in caplog.text
    # So too where prompts have come.
    found, steps = lay_out(CONFIG, make_order(10, 10), opened=((0, 8), (8, 10)))
    assert steps == 6 + 2 + 6 + 2 and found.optimizer.warmup_steps == 4


def change_rounds(**fields):
    return dataclasses.replace(CONFIG, rounds=dataclasses.replace(CONFIG.rounds, **fields))


def test_the_schedule_counts_all_passes(caplog):
    """10 prompts twice are the rounds of 8, 8 and 4 of 20."""
    assert lay_out(change_rounds(passes=2), make_order(10)) == (change_rounds(passes=2), 6 + 6 + 3)
    assert not caplog.records
    more, steps = lay_out(change_rounds(passes=3), make_order(5))
    assert steps == 6 + 5 and "data.train: 15 prompts in 3 passes are enough" in caplog.text
    # Raised on the way: the warm-up stays that of the pass at the start, 6 + 2 steps.
    segments = ({"round": 3, "step": 8, "changed": {"rounds.passes": [1, 2]}},)
    config = change_rounds(passes=2)
    more, steps = lay_out(
        config, make_order(10), History(config, segments=segments), ((0, 8), (8, 10))
    )
    assert steps == 6 + 2 + 6 + 2 and more.optimizer.warmup_steps == 4


def test_a_skip_that_leaves_nothing_of_all_passes_is_an_error():
    config = change_rounds(num_skip=20, passes=2)
    with pytest.raises(ConfigError, match=r"got 20, but data\.train has 10 prompts in each of 2"):
        lay_out(config, make_order(10))
    assert lay_out(change_rounds(num_skip=19, passes=2), make_order(10))[1] == 1


def test_rounds_that_are_done_had_the_epochs_of_their_time():
    segments = ({"round": 3, "step": 12, "changed": {"train.epochs": [1, 3]}},)
    more = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=4, epochs=3))
    assert lay_out(more, make_order(100), History(more, segments=segments))[1] == 6 + 6 + 9


def test_the_rounds_that_were_begun_are_in_the_budget(tmp_path):
    assert outlook.make_budget(CONFIG, tmp_path) == Budget(20, 8)
    for round, (start, stop) in ((1, (0, 8)), (2, (8, 10))):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True)
        manifests.save_manifest(folder, Manifest(round=round, start=start, stop=stop))
    assert outlook.make_budget(CONFIG, tmp_path) == Budget(20, 8, 0, ((0, 8), (8, 10)))


def test_a_complete_run_sees_prompts_that_have_come(tmp_path):
    file = tmp_path / "t.jsonl"
    config = dataclasses.replace(CONFIG, data=DataConfig(train=str(file)))

    def write(count):
        file.write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(count)))

    assert not outlook.has_new_prompts(config, tmp_path)
    write(10)
    save_order(load_order(config, tmp_path), tmp_path)
    assert not outlook.has_new_prompts(config, tmp_path)
    write(12)
    assert outlook.has_new_prompts(config, tmp_path)
    small = dataclasses.replace(config, rounds=RoundsConfig(total_prompts=10))
    assert not outlook.has_new_prompts(small, tmp_path), "it has had all that it may"
    twice = dataclasses.replace(config, rounds=RoundsConfig(total_prompts=20, passes=2))
    assert not outlook.has_new_prompts(twice, tmp_path), "two passes over 10 were enough"
    file.unlink()
    assert not outlook.has_new_prompts(config, tmp_path), "a complete run needs no data"


def test_a_size_that_is_given_is_no_decision():
    assert outlook.choose_prompts_per_round(CONFIG, Budget(20, 8), [Manifest(0)], 100) == (8, {})


def test_a_size_is_chosen_by_the_signs_of_the_last_round_and_what_is_left():
    rounds = RoundsConfig(
        total_prompts=100,
        prompts_per_round="auto",
        min_prompts_per_round=4,
        max_prompts_per_round=32,
        num_skip=2,
    )
    config = dataclasses.replace(CONFIG, rounds=rounds)
    # 4 steps of 4 examples, of which a prompt gives 3, and half of them: 11 prompts, in fours.
    budget = outlook.make_budget(config, Path("nowhere"))
    assert budget == Budget(100, 12, 2)
    done = [Manifest(0)]
    first = {"prompts": 12, "reason": "the first round"}
    assert outlook.choose_prompts_per_round(config, budget, done, 500) == (
        12,
        {"prompts_per_round": first},
    )
    # The first round was refilled to 20 prompts: the next one has half of the 12.
    decisions = {"prompts_per_round": first}
    metrics = {"steps_done": 4, "stale_ess": 0.3}
    done.append(Manifest(1, start=2, stop=22, metrics=metrics, decisions=decisions))
    budget = budget.open(1, 2, 22)
    size, chosen = outlook.choose_prompts_per_round(config, budget, done, 500)
    assert (
        size == 8
        and "effective share of its samples 0.30" in (chosen["prompts_per_round"]["reason"])
    )
    # 31 prompts of the order: 9 are left, and a rest of one would be too small.
    assert outlook.choose_prompts_per_round(config, budget, done, 31)[0] == 9
    plain = Manifest(3, start=5, stop=9)
    assert outlook.read_signs(plain, 1e-6, Config()) == RoundSigns(3, 4, 1e-6, {})
    back = Manifest(3, decisions={"guard": {"action": "retry", "to": 1, "rate_factor": 0.5}})
    assert outlook.read_signs(back, 1e-6, Config()) == RoundSigns(3, 0, 1e-6, {}, back_to=1)


def test_a_reward_that_compares_one_policy_s_samples_is_no_sign():
    signs = {"reward_eval": 0.5, "reward_eval/low": 0.4, "reward_eval/high": 0.6, "kl_sft": 1.0}
    done = Manifest(3, metrics={**signs, "reward_eval/other": 0.25})
    assert outlook.read_signs(done, 1e-6, Config()).metrics == done.metrics
    compared = Config(reward=RewardConfig(kind="judge", judge=JudgeConfig(mode="compare")))
    found = outlook.read_signs(done, 1e-6, compared).metrics
    assert found == {"kl_sft": 1.0, "reward_eval/other": 0.25}


def test_a_run_that_decides_its_steps_on_the_way_keeps_the_warm_up_of_its_start(caplog):
    caplog.set_level(logging.INFO)
    feedback = dataclasses.replace(CONFIG.feedback, min_examples=20)
    config = dataclasses.replace(CONFIG, feedback=feedback)
    for opened in ((), ((0, 13),), ((0, 13), (13, 20))):
        assert lay_out(config, make_order(100), opened=opened) == (config, 15)
    assert not caplog.records
