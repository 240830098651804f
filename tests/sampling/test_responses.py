"""The sample that a finished draft becomes; where it ends is tested with the sampler."""

import types

import numpy as np

from halos_jax.config import SamplingConfig
from halos_jax.drawn import Drawn
from halos_jax.sampling.responses import make_sample, pack_sets
from halos_jax.sampling.schedule import Draft
from halos_jax.types import Prompt, Turn


def make_draft(**fields):
    prompt = Prompt("p", (Turn("user", "q"),))
    draft = Draft(prompt, (1, 2), 0, 0, np.zeros(2, np.uint32), [7, 9], [-1.0, -2.0], [0.5, 0.1])
    draft.finish_reason = "stop"
    for name, value in fields.items():
        setattr(draft, name, value)
    return draft


def finish(draft, **settings):
    sampler = types.SimpleNamespace(settings=SamplingConfig(temperature=0.7, **settings))
    return make_sample(sampler, draft, "me")


def test_kept_ids_ascend_and_end_with_the_response():
    kept = [np.array([3, 7], np.int32), np.array([9, 4, 5, 8], np.int32)]  # of tokens cut off
    draft = make_draft(drawn_logps=[-0.5, 0.0], kept_counts=[2, 1], kept=kept)
    sample = finish(draft, exact_ratios=True)
    expected = np.array([3, 7, 9], "<i4").tobytes()
    assert sample.drawn == Drawn(0.7, (-0.5, 0.0), (2, 1), expected)
    assert sample.logps is None and sample.sum_logps == -3.0 and sample.mean_entropy == 0.3


def test_the_sets_of_a_chunk_are_packed_by_slot():
    idle = [-1, -1, -1]
    kept = np.array([[[7, 3, -1], [0, -1, -1]], [idle, idle], [[5, 4, 8], idle]], np.int32)
    sets = pack_sets(kept)
    assert sets.counts.tolist() == [[2, 1], [0, 0], [3, 0]]
    assert [ids.tolist() for ids in sets.ids] == [[3, 7, 0], [], [4, 5, 8]]


def test_plain_log_probs_are_kept_where_asked_for_or_where_there_are_no_others():
    assert finish(make_draft()).logps is None
    assert finish(make_draft(), keep_logps=True).logps == (-1.0, -2.0)
    assert finish(make_draft(), exact_ratios=True).logps == (-1.0, -2.0)
    exact = make_draft(drawn_logps=[-0.5, 0.0])
    assert finish(exact, exact_ratios=True).logps is None
    both = finish(exact, exact_ratios=True, keep_logps=True)
    assert both.logps == (-1.0, -2.0) and both.drawn == Drawn(0.7, (-0.5, 0.0))
