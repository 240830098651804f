"""When a round gets further prompts, how many, and what counts as an example."""

import dataclasses

import pytest

from halos_jax.config import FeedbackConfig
from halos_jax.losses import get_loss
from halos_jax.rounds.refill import extents
from halos_jax.rounds.refill.extents import Extent
from halos_jax.workdir.manifests import Manifest

FEEDBACK = FeedbackConfig(min_examples=10, max_prompts_factor=2.5)


def follow(counts, *, end=100, shard=4, feedback=FEEDBACK):
    """Return the stops of a round of 8 prompts from prompt 2 on, and why it ended.

    `counts` are its examples after each extent.
    """
    manifest, stops = Manifest(1, start=2, stop=10), []
    for examples in counts:
        stop, ended = extents.extend(feedback, manifest, examples, end=end, shard=shard)
        decisions = extents.add_extent(manifest, Extent(manifest.stop, examples), ended)
        stops.append(manifest.stop)
        manifest = dataclasses.replace(manifest, stop=stop, decisions=decisions)
        assert extents.has_ended(manifest) == bool(ended)
    assert [(one.stop, one.examples) for one in extents.read_extents(manifest)] == [
        *zip(stops, counts, strict=True)
    ]
    return stops, ended, manifest


def test_a_round_grows_by_a_shard_until_it_has_its_examples():
    stops, ended, manifest = follow([3, 6, 11])
    assert (stops, ended) == ([10, 14, 18], extents.ENOUGH)
    assert extents.measure_refill(manifest) == {"feedback_extensions": 2, "feedback_refilled": 8}
    stops, ended, manifest = follow([10])
    assert (stops, ended) == ([10], extents.ENOUGH)
    assert extents.measure_refill(manifest) == {"feedback_extensions": 0, "feedback_refilled": 0}


def test_a_round_ends_with_its_share_or_with_the_prompts():
    # 2.5 times its 8 prompts are 20: a shard of 8, and then the 4 that are left.
    assert follow([0, 1, 2], shard=8)[:2] == ([10, 18, 22], extents.MOST)
    assert follow([0, 1], end=13)[:2] == ([10, 13], extents.USED_UP)
    assert follow([0], end=10)[:2] == ([10], extents.USED_UP)
    once = dataclasses.replace(FEEDBACK, max_prompts_factor=1.0)
    assert follow([0], feedback=once)[:2] == ([10], extents.MOST)
    # Enough in the last that it may have is enough.
    assert follow([0, 10], end=13)[1] == extents.ENOUGH


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        ("pairwise", "dpo", 5),
        ("pairwise", "kto", 10),
        ("binary", "kto", 7),
        ("scalar", "grpo", 7 - 3 - 1),
        ("scalar", "ppo", 7),
    ],
)
def test_an_example_is_one_that_teaches_something(kind, loss, expected):
    counts = {"pairs": 5, "examples": 7, "equal": 3, "single": 1}
    found = extents.count_examples(FeedbackConfig(type=kind), get_loss({"name": loss}), counts)
    assert found == expected


def test_a_round_without_refill_has_no_extents():
    assert not extents.is_on(FeedbackConfig()) and extents.is_on(FEEDBACK)
    assert extents.read_extents(Manifest(1)) == [] and not extents.has_ended(Manifest(1))
