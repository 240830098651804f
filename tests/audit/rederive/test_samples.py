"""Samples drawn again, shard by shard."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from halos_jax.audit.rederive import samples
from halos_jax.audit.rederive.samples import Draws
from halos_jax.config import Config, SamplingConfig
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn

SETTINGS = SamplingConfig(
    num_samples_per_prompt=2, shard_prompts=2, max_prompt_length=9, max_tokens=3, stop=("!",)
)
END = 7
PROMPTS = [Prompt(f"p{number}", (Turn("user", "ab"),)) for number in range(5)]


class Renderer:
    """A letter is a token."""

    def render_prompt(self, turns, limit):
        return tuple(map(ord, turns[0].content))[-limit:]

    def render_prefix(self, text):
        return (1,)

    def decode_response(self, ids):
        return "".join(chr(one) for one in ids if one != END)


SAMPLER = SimpleNamespace(settings=SETTINGS, renderer=Renderer(), stop_ids=(END,))
RUN = SimpleNamespace(config=Config(sampling=SETTINGS), sampler=SAMPLER)


def make_sample(prompt, number, text="x", finish=FINISH_STOP):
    ids = tuple(map(ord, text)) + (END,) * (finish == FINISH_STOP)
    return Sample(
        prompt,
        number,
        output=text.partition("!")[0],
        prompt_ids=(97, 98, 1),
        response_ids=ids,
        finish_reason=finish,
        sum_logps=-0.5,
        logps=(-0.5, *(0.0 for _ in ids[1:])),
    )


def make_draws(prompts=PROMPTS):
    found = [make_sample(prompt, number) for prompt in prompts for number in range(2)]
    return Draws("samples", 1, prompts, found)


def test_whole_shards_are_chosen_until_there_are_enough_samples():
    draws = [make_draws(PROMPTS[:3]), make_draws(PROMPTS[3:])]
    places = [(0, 0), (0, 1), (1, 0)]
    assert samples.choose_shards(draws, 2, -1, seed=0) == places
    assert samples.choose_shards(draws, 2, 0, seed=0) == []
    chosen = {tuple(samples.choose_shards(draws, 2, 1, seed=seed)) for seed in range(20)}
    assert chosen == {((0, 0),), ((0, 1),), ((1, 0),)}
    assert samples.choose_shards(draws, 2, 9, seed=1) == places


def test_samples_whose_parts_belong_together_pass():
    cut = make_sample(PROMPTS[4], 1, "abc", FINISH_LENGTH)
    draws = make_draws()
    draws = dataclasses.replace(draws, samples=[*draws.samples[:-1], cut])
    finding = samples.check_prompts(RUN, [draws])
    assert (finding.outcome, finding.amount) == ("passed", "10 samples")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"output": "y"}, "its output is not the text of its response_ids"),
        ({"response_ids": (121, END)}, "its output is not the text of its response_ids"),
        ({"prompt_ids": (97, 98, 2)}, "its prompt_ids are not the tokens of its prompt"),
        ({"sample_id": 3}, "its prompt or number is another one"),
        ({"prompt": PROMPTS[0]}, "its prompt or number is another one"),
        ({"finish_reason": FINISH_LENGTH}, "it ends as if cut by the token limit"),
        ({"response_ids": (END, 120)}, "it goes on after a token that ends an answer"),
        ({"sum_logps": -0.25}, "its sum_logps is not the sum of its logps"),
    ],
)
def test_a_sample_that_was_edited_is_named(change, why):
    draws = make_draws()
    found = [*draws.samples]
    found[5] = dataclasses.replace(found[5], **change)
    finding = samples.check_prompts(RUN, [dataclasses.replace(draws, samples=found)])
    assert finding.outcome == "differs"
    assert finding.why.startswith(f"sample 1 of prompt p2: {why}")


def test_a_sample_too_few_is_found():
    draws = make_draws()
    finding = samples.check_prompts(RUN, [dataclasses.replace(draws, samples=draws.samples[1:])])
    assert finding.why == "9 samples, expected 10: 2 of each prompt"


def check_drawn(monkeypatch, made, *, is_same, scored=()):
    def draw(rollouts, params, prompts, folder, *, round, label):
        assert (round, params) == (1, "policy")
        return [one for one in made if one.prompt in prompts]

    monkeypatch.setattr(samples.stages, "sample_prompts", draw)
    monkeypatch.setattr(samples, "score_tokens", lambda run, params, known: list(scored))
    monkeypatch.setattr(samples.rescore, "find_bounds", lambda config: (0.006, 0.01))
    return samples.check_drawn(
        SimpleNamespace(trainer=RUN),
        RUN,
        "policy",
        [make_draws()],
        [(0, 1), (0, 2)],
        is_same=is_same,
        folder="there",
    )


def test_the_same_tokens_and_log_probabilities_pass(monkeypatch):
    finding = check_drawn(monkeypatch, make_draws().samples, is_same=True)
    assert (finding.outcome, finding.amount) == ("passed", "6 of 10 samples")
    assert finding.why == "shards 1, 2"


def change_one(**change):
    found = [*make_draws().samples]
    found[6] = dataclasses.replace(found[6], **change)
    return found


def test_another_token_differs_on_the_same_execution(monkeypatch):
    finding = check_drawn(monkeypatch, change_one(response_ids=(122, END)), is_same=True)
    assert finding.outcome == "differs"
    assert finding.why.startswith(
        "1 are not what this policy draws; sample 0 of prompt p3: 1 response_ids[0]: 120 is"
    )


@pytest.mark.parametrize(
    ("logps", "outcome", "said"),
    [
        ((-0.505, 0.0), "passed", "0.0025 on average and 0.005 at most"),
        ((-0.512, 0.0), "differs", "0.006 on average and 0.012 at most"),
        ((-0.507, 0.007), "differs", "0.007 on average and 0.007 at most"),
        ((-0.5, float("nan")), "differs", "nan on average and nan at most"),
    ],
)
def test_another_token_elsewhere_is_judged_by_the_recorded_one(monkeypatch, logps, outcome, said):
    found = check_drawn(
        monkeypatch,
        change_one(response_ids=(122, END)),
        is_same=False,
        scored=[np.array(logps)],
    )
    assert found.outcome == outcome
    assert f"differs by {said}, allowed: 0.006 and 0.01" in found.why
    assert outcome == "differs" or "5 are the same to the last bit, 1 have other" in found.why


# --------------------------------------------------------------------------- on an accelerator


def check_on_gpu(monkeypatch, made, programs="", scored=()):
    monkeypatch.setattr(samples.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(samples, "explain_programs", lambda: programs)
    return check_drawn(monkeypatch, made, is_same=True, scored=scored)


def change_shard(first, count):
    """Return the samples, of which `count` from `first` on have another token."""
    found = [*make_draws().samples]
    for at in range(first, first + count):
        found[at] = dataclasses.replace(found[at], response_ids=(122, END))
    return found


def test_a_gpu_that_repeats_a_shard_repeats_all_of_it(monkeypatch):
    found = check_on_gpu(monkeypatch, change_shard(4, 1))
    assert found.outcome == "differs"
    assert found.why.startswith("1 are not what this policy draws; sample 0 of prompt p2")


@pytest.mark.parametrize(
    ("made", "programs", "said"),
    [
        (change_shard(4, 1), "programs had to be compiled again: jit_decode_chunk", "jit_decode"),
        (change_shard(4, 2), "", "by the run's programs, which repeat themselves here in no shard"),
    ],
)
def test_without_equal_bits_recorded_tokens_are_re_scored(monkeypatch, made, programs, said):
    count = sum(one.response_ids == (122, END) for one in made)
    close, far = np.array((-0.503, 0.0)), np.array((-4.0, 0.0))
    found = check_on_gpu(monkeypatch, made, programs, [close] * count)
    assert (found.outcome, found.amount) == ("passed", "6 of 10 samples")
    assert f"{6 - count} are the same to the last bit, {count} have other tokens" in found.why
    assert "0.0015 on average and 0.003 at most" in found.why and said in found.why
    found = check_on_gpu(monkeypatch, made, programs, [close] * (count - 1) + [far])
    assert found.outcome == "differs" and "the largest is in sample" in found.why


def test_other_keys_part_more_often_than_rounding_does():
    """Answers of the same policy to other keys have its log-probabilities, too."""
    draws = make_draws([Prompt(f"p{number}", PROMPTS[0].turns) for number in range(9)])
    again = samples.Again()
    others = [dataclasses.replace(one, response_ids=(122, END)) for one in draws.samples]
    again.add_shard(draws.samples, others[:17] + draws.samples[17:])
    assert again.count_turns() == (17, 17 + 2)
    assert (again.equal, again.tokens, len(again.others)) == (1, 2, 17)


def test_draws_with_other_keys_differ(monkeypatch):
    close = np.array((-0.501, 0.0))
    monkeypatch.setattr(samples, "_FEW", 0)
    found = check_on_gpu(monkeypatch, change_shard(4, 4), scored=[close] * 4)
    assert found.outcome == "differs"
    assert "the same keys drew another token 4 times in 8 tokens, which rounding explains 0" in (
        found.why
    )


def test_an_edited_token_is_not_lost_in_the_sum_of_a_long_answer():
    long = dataclasses.replace(
        make_sample(PROMPTS[0], 1), response_ids=(120,) * 400, sum_logps=-200.0, logps=None
    )
    bounds, honest = (0.05, 2.0), np.full(400, -0.5)
    assert samples._measure_gaps([long], [honest], bounds) == (0.0, 0.0, "")
    edited = honest.copy()
    edited[7] = -9.0  # 8.5 nats: 0.02 a token, if they were spread
    mean, largest, wrong = samples._measure_gaps([long], [edited], bounds)
    assert (mean, largest) == (pytest.approx(0.02125), pytest.approx(0.02125))
    assert wrong == "that of sample 1 of prompt p0 by 8.5, at most 3"
    edited[7] = math.nan
    assert "the largest is in sample 1" in samples._measure_gaps([long], [edited], bounds)[2]


@pytest.mark.parametrize("has_logps", [True, False])
def test_the_gap_of_a_token_is_found_in_sums_too(has_logps):
    """Rounding of both signs is lost in a sum, which a bound on near ties must not be."""
    noise = np.random.default_rng(0).normal(0, 0.01, (64, 400))
    made = make_sample(PROMPTS[0], 1)
    answers = [
        dataclasses.replace(
            made,
            response_ids=(120,) * 400,
            logps=tuple(-0.5 + row) if has_logps else None,
            sum_logps=math.fsum(-0.5 + row),
        )
        for row in noise
    ]
    gap = samples._estimate_gap(answers, [np.full(400, -0.5)] * len(answers))
    assert gap == pytest.approx(0.01 * math.sqrt(2 / math.pi), rel=0.01 if has_logps else 0.2)
