"""Samples drawn again, shard by shard."""

import dataclasses
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
