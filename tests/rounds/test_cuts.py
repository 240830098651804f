"""What token limits cut of prompts and samples is said with its share."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from halos_jax.config import ConfigError, SamplingConfig
from halos_jax.drawn import Drawn
from halos_jax.rounds.cuts import check_prompts, measure_samples, report_samples
from halos_jax.types import FINISH_LENGTH, FINISH_STOP, Prompt, Sample, Turn


class LetterRenderer:
    """One token a letter and a header of two; the shortest prompt has two tokens."""

    def render_prompts(self, prompts, max_length):
        for turns in prompts:
            yield self.render_prompt(turns, max_length)

    def render_prompt(self, turns, max_length):
        if max_length < 2:
            raise ConfigError(f"max_length: got {max_length}")
        return (*map(ord, turns[-1].content), 1, 2)[-max_length:]

    def render_prefix(self, text):
        return tuple(map(ord, text))


def make_sampler(positions=0, **settings):
    options = {"max_prompt_length": 5, "max_tokens": 4} | settings
    return SimpleNamespace(
        settings=SamplingConfig(**options),
        renderer=LetterRenderer(),
        decoder=SimpleNamespace(max_positions=positions),
    )


def make_prompts(*texts):
    return [Prompt(f"p{number}", (Turn("user", text),)) for number, text in enumerate(texts)]


def test_prompts_that_will_be_cut_are_said_before_anything_is_sampled(caplog):
    prompts = make_prompts("a", "abc", "abcd", "abcd", "abcdef")
    check_prompts(make_sampler(), ("train.jsonl", prompts), ("eval.jsonl", prompts[:2]))
    (record,) = caplog.records
    assert record.message == (
        "train.jsonl: 2 of 4 prompts (50 %, the longest has 8 tokens) are longer than "
        "sampling.max_prompt_length=5: they lose their beginning"
    )
    caplog.clear()
    check_prompts(make_sampler(prefix="<>"), ("x", prompts[:2]))  # which is a part of the prompt
    assert "x: 1 of 2 prompts" in caplog.text


def test_a_limit_that_the_template_alone_exceeds_is_an_error():
    with pytest.raises(ConfigError, match="got 1"):
        check_prompts(make_sampler(max_prompt_length=1), ("x", make_prompts("abc")))
    with pytest.raises(ConfigError, match="got 1"):
        check_prompts(make_sampler(max_prompt_length=3, prefix="<>"), ("x", make_prompts("abc")))


@pytest.mark.parametrize("positions, said", [(0, False), (8, True), (9, False)])
def test_limits_beyond_the_models_positions_are_said(caplog, positions, said):
    check_prompts(make_sampler(positions), ("x", make_prompts("a")))
    expected = "max_prompt_length + sampling.max_tokens = 9, but the model was made for 8 positions"
    assert (expected in caplog.text) == said


def make_samples(*reasons):
    (prompt,) = make_prompts("a")
    return [
        Sample(prompt, number, "", (1, 2), (3,) * (number + 1), reason)
        for number, reason in enumerate(reasons)
    ]


def test_samples_that_were_cut_are_counted_and_a_round_of_them_is_warned_of(caplog):
    caplog.set_level(logging.INFO)
    report_samples(make_sampler(), make_samples(FINISH_STOP, FINISH_STOP), "round 1")
    assert not caplog.records
    report_samples(make_sampler(), make_samples(FINISH_STOP, FINISH_LENGTH), "round 1")
    (record,) = caplog.records
    assert (record.levelname, record.message) == (
        "INFO",
        "round 1: 1 of 2 samples (50 %) were cut at sampling.max_tokens=4",
    )
    caplog.clear()
    report_samples(make_sampler(), make_samples(FINISH_LENGTH, FINISH_LENGTH), "round 2")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("round 2: all 2 samples were cut at sampling.max_tokens=4")


def test_samples_beyond_the_models_positions_are_counted(caplog):
    report_samples(make_sampler(positions=4), make_samples(*[FINISH_STOP] * 4), "round 1")
    assert (
        "round 1: 2 of 4 sequences (50 %, the longest has 6 tokens) go beyond the 4 positions"
        in caplog.text
    )


def test_the_metrics_of_samples():
    samples = make_samples(FINISH_STOP, FINISH_LENGTH, FINISH_STOP)
    known = measure_samples(samples)
    assert (known["samples"], known["truncated"], len(known)) == (3, 1, 3)
    again = dataclasses.replace(samples[0].prompt, prompt_id="p#3", pass_number=3)
    later = [*samples, dataclasses.replace(samples[0], prompt=again)]
    assert measure_samples(later)["prompt_pass"] == (1 + 1 + 1 + 3) / 4


@pytest.mark.parametrize(("top_k", "full"), [(0, 2), (0, 1), (3, 2)])
def test_sets_that_are_full_are_counted(caplog, top_k, full):
    counts = (3, 3 if full == 2 else 2, *(1,) * 28)
    drawn = Drawn(0.7, (-0.5,) * 30, counts, b"")
    samples = [dataclasses.replace(one, drawn=drawn) for one in make_samples(FINISH_STOP)]
    with caplog.at_level(logging.INFO):
        report_samples(make_sampler(max_kept=3, top_k=top_k, top_p=0.9), samples, "round 1")
    first, *others = caplog.records
    assert first.getMessage().startswith("round 1: a token was drawn from 1.1")
    assert len(others) == (top_k == 0)
    for one in others:
        assert one.getMessage().startswith(
            f"round 1: {full} of 30 tokens ({100 * full / 30:.3g} %)"
        )
        assert one.levelno == (logging.WARNING if full == 2 else logging.INFO)
