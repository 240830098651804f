"""Which samples are watched, and their log-probabilities under another policy."""

import dataclasses
import logging
import math

import numpy as np
import pytest

from halos_jax.config import Config, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.data.tokenize import make_group_items
from halos_jax.rounds.watch import watched
from halos_jax.signs.intervals import Estimate
from halos_jax.training import loop as training
from halos_jax.types import CHOSEN, REJECTED, Item, Prompt, Sample
from tests.rounds.stand_ins import CONFIG, make_run


def make_samples(prompts=20, each=4):
    return [
        Sample(Prompt(f"p{i}", ()), k, "", (1, i), (k, i, 2), "stop", sum_logps=-1.0 * k - i)
        for i in range(prompts)
        for k in range(each)
    ]


def choose(count, *, seed=0, round=1, samples=None):
    config = Config(seed=seed, rounds=RoundsConfig(watch_samples=count))
    return watched.choose_watched(config, samples or make_samples(), round)


def names(chosen):
    return list(dict.fromkeys(one.prompt.prompt_id for one in chosen))


def test_whole_prompts_are_chosen_by_seed_round_and_prompt_alone():
    samples = make_samples()
    chosen = choose(19)
    assert len(chosen) == 16 and chosen == [one for one in samples if one in chosen]
    assert set(names(choose(19, samples=samples[::-1]))) == set(names(chosen))
    assert names(choose(19, round=2)) != names(chosen) != names(choose(19, seed=1))
    # A smaller number takes a part of these; fewer prompts leave the others as they are.
    assert set(names(choose(8))) < set(names(chosen))
    rest = [one for one in samples if one.prompt.prompt_id not in names(choose(4))]
    assert set(names(choose(12, samples=rest))) <= set(names(chosen))


def test_none_all_and_one_at_least():
    assert choose(0) == [] and choose(-1) == make_samples() and len(choose(1)) == 4


def test_samples_of_an_earlier_version_are_not_watched(caplog):
    samples = make_samples(2)
    old = [dataclasses.replace(one, sum_logps=None) for one in samples]
    with caplog.at_level(logging.INFO):
        assert choose(-1, samples=old) == []
    assert "have no sum_logps" in caplog.text
    assert choose(-1, samples=[*samples[:4], *old[4:]]) == samples[:4]


def test_prompts_with_a_sample_longer_than_a_row_are_not_watched(caplog):
    """Two tokens of the prompt and three or nine of the response: a row of 10 holds the former."""
    samples = make_samples(3)
    samples[5] = dataclasses.replace(samples[5], response_ids=(1,) * 9)
    config = Config(rounds=RoundsConfig(watch_samples=-1), train=TrainConfig(tokens_per_device=10))
    chosen = watched.choose_watched(config, samples, 2)
    assert chosen == [*samples[:4], *samples[8:]]
    assert "round 2: 1 of 3 prompts have a sample of more than train.tokens_per_device=10" in (
        caplog.text
    )
    items, _ = make_group_items(chosen, max_tokens=10)
    assert max(item.num_tokens for item in items) <= 10


def test_exact_is_temperature_1_from_all_tokens():
    plain = SamplingConfig(temperature=1.0, top_p=1.0)
    assert watched.is_exact(plain)
    for change in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}):
        assert not watched.is_exact(dataclasses.replace(plain, **change))


def test_sums_are_in_the_order_of_the_samples_whatever_shares_an_item(monkeypatch):
    samples, asked = make_samples(3), []

    def compute(trainer, items, params, *, recurring, label):
        asked.append((params, recurring, label, [len(item.responses) for item in items]))
        return [
            [np.array([0.5, float(ids[0]), 10.0 * ids[1]], np.float32) for ids in item.responses]
            for item in items
        ]

    monkeypatch.setattr(training, "compute_logps", compute)
    # 2 tokens of a prompt, 3 of each response: three responses fit.
    config = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, tokens_per_device=11)
    )
    sums = watched.compute_sums(make_run(config=config), samples, "params", label="signs")
    assert sums == [0.5 + one.sample_id + 10 * one.prompt_ids[1] for one in samples]
    assert asked == [("params", "watched", "signs", [3, 1] * 3)]


def test_a_pass_is_planned_under_the_name_that_it_has(monkeypatch):
    planned = []
    monkeypatch.setattr(
        training, "plan_pass", lambda trainer, items, recurring: planned.append(recurring)
    )
    watched.plan_watched(make_run(), make_samples(1))
    watched.plan_watched(make_run(), [])
    assert planned == ["watched"]


def test_responses_are_known_by_their_tokens():
    sample = make_samples(1, 1)[0]
    item = Item(np.array([1, 0]), (np.array([0, 0, 2]), np.array([5, 2])), (CHOSEN, REJECTED))
    parts = [np.array([-0.5, -0.25, -1.0]), np.array([-3.0, -4.0])]
    found = watched.sum_by_key([item], [parts])
    assert list(found.values()) == [-1.75, -7.0]
    assert found[watched.key_of(sample)] == -1.75
    assert watched.list_keys(item) == list(found)
    # A response that is not a target as a whole is not known.
    assert watched.sum_by_key([item], [[parts[0][:2], parts[1]]]).keys() == {list(found)[1]}


def test_what_is_not_finite_is_left_out_and_said(caplog):
    found = watched.name_metrics(
        {"a": Estimate(1.0, 0.5, 1.5), "b": math.nan, "c": Estimate(math.inf, 0.0, 1.0), "d": 2.0}
    )
    assert found == {"a": 1.0, "a/low": 0.5, "a/high": 1.5, "d": 2.0}
    assert "b is not finite" in caplog.text and "c is not finite" in caplog.text
    assert watched.name_metrics({"e": Estimate(1.0, -math.inf, math.inf)}) == {"e": 1.0}


def test_sums_are_exact():
    assert watched.sum_tokens(np.array([1e8, 1.0, -1e8], np.float32)) == pytest.approx(1.0)
