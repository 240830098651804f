"""Feedback against a brute-force reading of the rules, and on groups worked out by hand."""

import itertools
import random
from dataclasses import replace

import pytest

from halos_jax.config import Config, FeedbackConfig
from halos_jax.data.records.formats import preference_from_record, preference_to_record
from halos_jax.rewards.feedback import (
    make_groups,
    make_judgements,
    make_pairwise,
    make_preferences,
    weigh_by_margin,
)
from halos_jax.types import Prompt, Sample, Turn


def make_samples(rewards, prompt_id="p"):
    prompt = Prompt(prompt_id, (Turn("user", f"question {prompt_id}"),), {"answer": "4"})
    return [
        Sample(
            prompt=prompt,
            sample_id=index,
            output=f"answer {index}",
            prompt_ids=(1, 2, 3),
            response_ids=(10 + index, 7),
            finish_reason="stop",
            reward=reward,
        )
        for index, reward in enumerate(rewards)
    ]


def make(samples, mode, threshold=0.0, seed=0, round=1):
    return make_preferences(samples, mode=mode, threshold=threshold, seed=seed, round=round)


def pairs_of(result):
    return [(p.chosen.sample_id, p.rejected.sample_id) for p in result.preferences]


@pytest.mark.parametrize(
    ("mode", "rewards", "threshold", "pairs", "ties"),
    [
        ("max", [1, 4, 2, -3], 0, [(1, 3)], 0),
        ("max", [1, 4, 2, -3], 6.5, [(1, 3)], 0),
        ("max", [1, 4, 2, -3], 7, [], 1),  # a difference equal to the threshold is dropped
        ("max", [2, 5, 5, 1, 1], 0, [(1, 4)], 0),
        ("max", [3, 3], 0, [], 1),
        ("min", [0, 4, 1.5, 9], 0, [(2, 0)], 0),
        ("min", [0, 4, 1.5, 9], 2, [(1, 2)], 0),
        ("min", [0, 4, 1.5, 9], 2.5, [(1, 2)], 0),  # here it is kept
        ("min", [0, 4, 1.5, 9], 9, [(3, 0)], 0),
        ("min", [0, 4, 1.5, 9], 9.1, [], 1),
        ("min", [0, 1, 2], 0, [(2, 1), (1, 0)], 0),  # equally close pairs are all kept
        ("min", [1, 0, 1], 0.5, [(0, 1), (2, 1)], 0),
        ("min", [1, 1, 0], 0, [(0, 2), (1, 2)], 0),  # equal rewards prefer nothing
        ("min", [1, 1, 1], 0, [], 1),
        ("min", [0.1, 0.2, 0.3], 0.1, [(2, 1), (1, 0)], 0),  # 0.3 - 0.2 < 0.1 in binary
        ("all", [1, 4, 2], 0, [(1, 2), (1, 0), (2, 0)], 0),
        ("all", [1, 4, 2], 1, [(1, 2), (1, 0)], 1),
        ("all", [1, 4, 1], 0, [(1, 0), (1, 2)], 1),
    ],
)
def test_by_hand(mode, rewards, threshold, pairs, ties):
    result = make(make_samples(rewards), mode, threshold)
    assert pairs_of(result) == pairs
    assert result.counts["pairs"] == len(pairs) and result.counts["ties"] == ties


@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_min_and_max_against_brute_force(threshold):
    generator = random.Random(threshold)
    for _ in range(200):
        rewards = [generator.randint(-3, 3) for _ in range(generator.randint(2, 6))]
        samples = make_samples(rewards)
        gaps = {
            (i, j): rewards[i] - rewards[j]
            for i, j in itertools.permutations(range(len(rewards)), 2)
            if rewards[i] > rewards[j]
        }
        far = {pair: gap for pair, gap in gaps.items() if gap >= threshold}
        closest = {pair for pair, gap in far.items() if gap == min(far.values())}
        generator.shuffle(samples)
        assert sorted(pairs_of(make(samples, "min", threshold))) == sorted(closest)
        widest = {pair for pair, gap in gaps.items() if gap == max(gaps.values()) > threshold}
        found = set(pairs_of(make(samples, "max", threshold)))
        assert found <= widest and bool(found) == bool(widest)


def test_random_pairs_are_disjoint_and_use_everything():
    for size in range(2, 9):
        result = make(make_samples(range(size)), "random", seed=size)
        used = list(itertools.chain(*pairs_of(result)))
        assert len(used) == len(set(used)) == size // 2 * 2
        assert all(better > worse for better, worse in pairs_of(result))


def test_random_pairs_drop_differences_up_to_the_threshold():
    for seed in range(50):
        samples = make_samples([0, 1, 2, 3])
        loose = pairs_of(make(samples, "random", 0, seed))
        tight = make(samples, "random", 1, seed)
        assert pairs_of(tight) == [(a, b) for a, b in loose if a - b > 1]
        assert tight.counts["ties"] == 2 - tight.counts["pairs"]


def test_all_pairings_are_equally_likely():
    pairings = [
        frozenset(frozenset(pair) for pair in pairs_of(make(samples, "random", seed=seed)))
        for samples in [make_samples(range(4))]
        for seed in range(1500)
    ]
    counts = [pairings.count(pairing) for pairing in set(pairings)]
    # Three ways to pair four; 500 +- 18 each, five deviations.
    assert len(counts) == 3 and all(abs(count - 500) < 91 for count in counts)


def test_a_prompts_pairs_depend_on_seed_round_and_prompt_alone():
    groups = {f"p{i}": make_samples(range(4), f"p{i}") for i in range(30)}
    everything = [sample for group in groups.values() for sample in group]
    whole = make(everything, "random")
    alone = [make(group, "random").preferences for group in groups.values()]
    assert whole.preferences == list(itertools.chain(*alone))
    random.Random(1).shuffle(everything)
    again = make(everything, "random").preferences
    assert sorted(again, key=repr) == sorted(whole.preferences, key=repr)
    for changes in ({"seed": 1}, {"round": 2}):
        assert pairs_of(make(everything, "random", **changes)) != pairs_of(
            make(everything, "random")
        )
    # Not all prompts are shuffled alike.
    assert len({tuple(pairs_of(make(group, "random"))) for group in groups.values()}) > 3


def test_preferences_come_in_the_order_of_the_prompts():
    samples = make_samples([0, 1], "b") + make_samples([0, 1], "a") + make_samples([0, 1], "c")
    mixed = samples[::2] + samples[1::2]
    result = make(mixed, "max")
    assert [preference.prompt.prompt_id for preference in result.preferences] == ["b", "a", "c"]


def test_tokens_are_carried_and_survive_the_file():
    samples = make_samples([0.5, -1.0])
    [preference] = make(samples, "max").preferences
    assert preference.prompt is samples[0].prompt
    assert preference.prompt_ids == (1, 2, 3)
    assert preference.chosen.ids == (10, 7) and preference.rejected.ids == (11, 7)
    assert preference.chosen.turns == (Turn("assistant", "answer 0"),)
    assert (preference.chosen.reward, preference.rejected.reward) == (0.5, -1.0)
    assert preference_from_record(preference_to_record(preference, seed=1, round=1)) == preference


def test_a_cut_sample_keeps_its_finish_reason_and_log_probs():
    changes = {"finish_reason": "length", "logps": (-1.5, -0.5)}
    cut = [replace(sample, **changes) for sample in make_samples([0, 1], "q")]
    result = make(make_samples([0, 1]) + cut, "max")
    assert [p.chosen.finish_reason for p in result.preferences] == ["stop", "length"]
    assert [p.rejected.logps for p in result.preferences] == [None, (-1.5, -0.5)]
    assert result.counts["truncated"] == 2


def test_everything_is_counted():
    samples = (
        make_samples([0, 1, 2], "pair")
        + make_samples([1, 1], "tie")
        + make_samples([1], "single")
        + make_samples([None, 1], "unlabelled")
        + make_samples([None, 1, 0], "enough")
    )
    assert make(samples, "max").counts == {
        "prompts": 5,
        "pairs": 2,
        "ties": 1,
        "single": 2,
        "unlabelled": 2,
        "truncated": 0,
    }
    assert make([], "max").counts["prompts"] == 0


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (
            [],
            {"mode": "best"},
            r"feedback.mode: got 'best', allowed: 'random', 'max', 'min', 'all'",
        ),
        ([], {"mode": "max", "threshold": -1}, "feedback.threshold: got -1, allowed"),
        ([], {"mode": "max", "threshold": float("nan")}, "feedback.threshold: got nan, allowed"),
        (make_samples([float("nan"), 1]), {"mode": "max"}, "sample 0 of prompt p: got reward nan"),
        (
            make_samples([1, 2]) + make_samples([3]),
            {"mode": "max"},
            "sample 0 of prompt p: .*twice",
        ),
        (
            [*make_samples([1]), replace(make_samples([1, 2])[1], prompt_ids=(1,))],
            {"mode": "max"},
            "sample 1 of prompt p: got other prompt tokens than sample 0",
        ),
    ],
)
def test_bad_input_is_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        make(samples, **options)


# --------------------------------------------------------------------------- binary and scalar


TWO = [*make_samples([0, 1, 5], "p"), *make_samples([8, None, 10], "q")]


@pytest.mark.parametrize(
    ("threshold", "scope", "labels"),
    [
        (5, "file", [0, 0, 1, 1, 1]),  # a reward equal to the threshold is desirable
        (5.5, "file", [0, 0, 0, 1, 1]),
        (-1, "prompt", [1, 1, 1, 1, 1]),
        ("mean", "file", [0, 0, 1, 1, 1]),  # 4.8
        ("median", "file", [0, 0, 1, 1, 1]),  # 5
        ("mean", "prompt", [0, 0, 1, 0, 1]),  # 2 and 9
        ("median", "prompt", [0, 1, 1, 0, 1]),  # 1 and 9
    ],
)
def test_labels_by_hand(threshold, scope, labels):
    judgements, counts = make_judgements(TWO, threshold=threshold, scope=scope)
    assert [int(one.desirable) for one in judgements] == labels
    assert [one.completion.reward for one in judgements] == [0, 1, 5, 8, 10]
    assert counts == {
        "prompts": 2,
        "examples": 5,
        "desirable": sum(labels),
        "ties": 0,
        "unlabelled": 1,
        "truncated": 0,
    }
    assert judgements[0].prompt_ids == (1, 2, 3) and judgements[0].completion.ids == (10, 7)


@pytest.mark.parametrize("threshold", ["median", "mean"])
@pytest.mark.parametrize(
    ("rewards", "labels"),
    [
        ([1, 0, 0, 0], {"median": [1, 0, 0, 0], "mean": [1, 0, 0, 0]}),
        ([1, 1, 1, 0], {"median": [1, 1, 1, 0], "mean": [1, 1, 1, 0]}),
        ([1, 1, 0, 0], {"median": [1, 1, 0, 0], "mean": [1, 1, 0, 0]}),
        # 4 of 5 are 5 or more, 1 is more than that: the classes are as even, so as in HALOs.
        ([3, 5, 5, 5, 7], {"median": [0, 1, 1, 1, 1], "mean": [0, 1, 1, 1, 1]}),
        ([3, 3, 5, 5, 5, 7], {"median": [0, 0, 1, 1, 1, 1], "mean": [0, 0, 1, 1, 1, 1]}),
        ([3, 5, 5, 5, 6, 7, 7, 7], {"median": [0, 0, 0, 0, 1, 1, 1, 1], "mean": [0] * 4 + [1] * 4}),
        ([4, 5, 5, 5, 6, 6], {"median": [0, 0, 0, 0, 1, 1], "mean": [0, 0, 0, 0, 1, 1]}),
        ([7, 7, 7, 7], {"median": [], "mean": []}),
        ([0.1, 0.1, 0.1], {"median": [], "mean": []}),
        ([7], {"median": [], "mean": []}),
    ],
)
def test_rewards_equal_to_an_average_go_where_the_classes_are_more_even(threshold, rewards, labels):
    judgements, counts = make_judgements(make_samples(rewards), threshold=threshold)
    assert [int(one.desirable) for one in judgements] == labels[threshold]
    assert counts["ties"] == (0 if judgements else len(rewards))
    assert counts["examples"] == len(judgements) and counts["desirable"] == sum(labels[threshold])


def test_by_prompt_the_answers_of_a_prompt_whose_rewards_are_equal_get_no_label():
    samples = [*make_samples([1, 0, 0], "p"), *make_samples([0, 0, 0], "q")]
    samples += make_samples([1, 1, None], "r")
    judgements, counts = make_judgements(samples, threshold="median", scope="prompt")
    found = [(one.prompt.prompt_id, one.desirable) for one in judgements]
    assert found == [("p", True), ("p", False), ("p", False)]
    assert counts["ties"] == 5 and counts["unlabelled"] == 1
    judgements, counts = make_judgements(samples, threshold="median", scope="file")
    assert [int(one.desirable) for one in judgements] == [1, 0, 0, 0, 0, 0, 1, 1]
    assert counts["ties"] == 0


@pytest.mark.parametrize("threshold", ["auto", float("nan"), None])
def test_thresholds_of_labels_that_are_refused(threshold):
    with pytest.raises(ValueError, match=r"feedback\.threshold: got .*'mean', 'median'"):
        make_judgements(TWO, threshold=threshold)


def test_groups_keep_every_sample_with_a_reward_and_count_those_that_teach_nothing():
    samples = [*TWO, *make_samples([3, 3], "equal"), *make_samples([None, 2], "single")]
    samples += make_samples([None], "none")
    groups, counts = make_groups(samples)
    assert groups == [one for one in samples if one.reward is not None]
    assert counts == {
        "prompts": 5,
        "examples": 4,
        "single": 1,
        "equal": 1,
        "unlabelled": 3,
        "truncated": 0,
    }
    mixed = [samples[0], samples[3], samples[1]]
    assert make_groups(mixed)[0] == [samples[0], samples[1], samples[3]]  # a prompt's together


def sized(*samples):
    """Return samples of a prompt with given (reward, length)s."""
    made = make_samples([reward for reward, _ in samples])
    return [
        replace(one, response_ids=tuple(range(length)))
        for one, (_, length) in zip(made, samples, strict=True)
    ]


@pytest.mark.parametrize(
    ("mode", "gap", "pairs", "ruled_out"),
    [
        # Rewards 9, 7, 2, 0 of lengths 100, 40, 50, 10.
        ("max", 0.0, [(0, 3)], 0),
        ("max", 1.0, [(0, 3)], 0),
        ("max", 0.9, [(0, 3)], 0),  # 90 of 100 are within
        ("max", 0.89, [(0, 2)], 1),  # 50 of 100: better by 7
        ("max", 0.75, [(0, 2)], 1),
        ("max", 0.5, [(0, 2)], 1),
        ("max", 0.49, [(1, 2)], 1),  # 10 of 50
        ("max", 0.1, [], 1),
        ("all", 0.5, [(0, 2), (1, 2)], 4),
        ("min", 0.0, [(0, 1), (2, 3)], 0),
        ("min", 0.7, [(0, 1)], 1),
        ("min", 0.5, [(1, 2)], 2),
        ("min", 0.1, [], 2),
    ],
)
def test_a_pair_may_not_teach_length(mode, gap, pairs, ruled_out):
    samples = sized((9, 100), (7, 40), (2, 50), (0, 10))
    result = make_preferences(
        samples, mode=mode, threshold=0.0, seed=0, round=1, max_length_gap=gap
    )
    assert pairs_of(result) == pairs
    if not gap:
        assert "length_gap" not in result.counts
        return
    # What the gap rules out is no tie.
    assert (result.counts["length_gap"], result.counts["ties"]) == (ruled_out, 0)


def test_neighbours_beyond_the_gap_are_dropped_and_ties_stay_ties():
    samples = sized((9, 100), (7, 40), (2, 50), (2, 10))
    without = make_preferences(samples, mode="random", threshold=0.0, seed=0, round=1)
    for gap in (0.3, 0.7, 1.0):
        found = make_preferences(
            samples, mode="random", threshold=0.0, seed=0, round=1, max_length_gap=gap
        )
        lengths = {number: len(one.response_ids) for number, one in enumerate(samples)}
        kept = [
            pair
            for pair in pairs_of(without)
            if abs(lengths[pair[0]] - lengths[pair[1]]) <= gap * max(map(lengths.get, pair))
        ]
        assert pairs_of(found) == kept
        assert found.counts["length_gap"] == len(pairs_of(without)) - len(kept)
        assert found.counts["ties"] == without.counts["ties"]
    # The threshold holds for the pair that replaces another one.
    found = make_preferences(
        sized((9, 100), (7, 40), (6, 50)),
        mode="max",
        threshold=1,
        seed=0,
        round=1,
        max_length_gap=0.3,
    )
    assert found.preferences == [] and found.counts["length_gap"] == 1
    with pytest.raises(ValueError, match=r"got 0\.3, but 1 of 2 samples have no response_ids"):
        settings = {"mode": "max", "threshold": 1, "seed": 0, "round": 1}
        make_preferences(sized((9, 0), (7, 40)), **settings, max_length_gap=0.3)


def test_weights_are_margins_cut_and_of_mean_1():
    pairs = [
        make_preferences(make_samples([0, margin], name), mode="max", threshold=0, seed=0, round=1)
        for name, margin in (("a", 1), ("b", 1), ("c", 2), ("d", 12))
    ]
    preferences = [pair for one in pairs for pair in one.preferences]
    weights = [one.weight for one in weigh_by_margin(preferences, 100.0)]
    assert weights == pytest.approx([0.25, 0.25, 0.5, 3.0])  # over their mean, 4
    # Cut at 1.5 times the mean: 1, 1, 2, 6 of mean 2.5.
    weights = [one.weight for one in weigh_by_margin(preferences, 1.5)]
    assert weights == pytest.approx([0.4, 0.4, 0.8, 2.4])
    assert weigh_by_margin([], 2.0) == []


def test_the_config_chooses_pairs_and_their_weights():
    scored = [one for name in "ab" for one in make_samples([0, 1 + 2 * (name == "b")], name)]
    scored[0] = replace(scored[0], response_ids=(1, 2, 3, 4))
    settings = FeedbackConfig(margin_weights=5.0)
    rows, counts = make_pairwise(Config(feedback=settings), scored, 1)
    assert [row["weight"] for row in rows] == [0.5, 1.5] and "length_gap" not in counts
    settings = replace(settings, max_length_gap=0.4)
    rows, counts = make_pairwise(Config(feedback=settings), scored, 1)
    assert [row["prompt_id"] for row in rows] == ["b"] and counts["length_gap"] == 1
    assert "weight" not in rows[0], "the only pair has the mean margin"
