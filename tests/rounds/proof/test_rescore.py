"""Re-scoring: which samples, what differs, and when the run stops."""

import dataclasses
import math

import jax
import pytest

from halos_jax.config import Config, ModelConfig, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.rounds.context import NOTHING, StageResult
from halos_jax.rounds.proof import rescore
from halos_jax.rounds.proof.origin import OriginError
from halos_jax.rounds.proof.rescore import Difference, Rescoring
from halos_jax.rounds.watch.watched import choose_watched
from tests.rounds.stand_ins import PROMPTS, make_run, make_sample

ROWS = [
    {"prompt_id": "a", "sample_id": 0, "sampled": [-1.0, -2.0], "rescored": [-1.25, -2.0]},
    {"prompt_id": "b", "sample_id": 3, "sampled": [-0.5, -4.0], "rescored": [-0.5, -3.5]},
]


def make_config(count=8, per_prompt=2, dtype="float32", **rounds):
    return Config(
        seed=3,
        model=ModelConfig(compute_dtype=dtype),
        rounds=RoundsConfig(rescore_samples=count, **rounds),
        sampling=SamplingConfig(num_samples_per_prompt=per_prompt),
    )


def test_the_prompts_are_the_first_of_those_that_are_watched():
    found = [rescore.choose_prompts(make_config(count), PROMPTS, 1) for count in (0, 1, 3, 4, 99)]
    assert [len(names) for names in found] == [0, 1, 1, 2, len(PROMPTS)]
    assert found[1] < found[3] < found[4]
    assert rescore.choose_prompts(make_config(4), PROMPTS[::-1], 1) == found[3]
    assert {rescore.choose_prompts(make_config(1), PROMPTS, round) for round in range(9)} > {
        found[1]
    }
    samples = [
        dataclasses.replace(make_sample(prompt, number, 1), sum_logps=-1.0)
        for prompt in PROMPTS
        for number in range(2)
    ]
    watched = choose_watched(make_config(0, watch_samples=4), samples, 1)
    assert {one.prompt.prompt_id for one in watched} == found[3]


def test_what_differs_is_counted_over_all_tokens():
    found = rescore.compare(ROWS)
    assert (found.mean, found.largest, found.tokens) == (0.75 / 4, 0.5, 4)
    assert found.place == (
        "token 1 of sample 3 of prompt b, -4.0000 by the sampler and -3.5000 by the trainer"
    )
    assert found.metrics == {"rescore_mean": 0.1875, "rescore_max": 0.5, "rescore_tokens": 4.0}


@pytest.mark.parametrize(
    ("mean", "largest", "config"),
    [
        (2e-4, 1e-3, make_config()),
        (5e-5, 2e-2, make_config()),
        (0.06, 0.5, make_config(dtype="bfloat16")),
        (0.01, 2.5, make_config(dtype="bfloat16")),
        (0.02, 0.5, make_config(dtype="bfloat16", rescore_mean=0.01)),
        (0.0, 1e-6, make_config(rescore_max=0.0)),
        (math.nan, math.nan, make_config()),
    ],
)
def test_beyond_a_bound_the_run_stops(mean, largest, config):
    found = Difference(mean, largest, 40, "token 3")
    with pytest.raises(OriginError) as error:
        rescore.check(config, found, 2)
    dtype = config.model.compute_dtype
    for part in ("round 2: ", "token 3; 40 tokens", f"in {dtype}", "rounds.rescore_mean=", "kept"):
        assert part in str(error.value)


def test_rounding_is_within_the_bounds():
    rescore.check(make_config(), Difference(1e-4, 1e-2, 1, ""), 1)
    rescore.check(make_config(dtype="bfloat16"), Difference(0.05, 2.0, 1, ""), 1)
    wide = make_config(rescore_mean=1.0, rescore_max=9.0)
    rescore.check(wide, Difference(0.9, 8.0, 1, ""), 1)
    assert rescore.find_bounds(wide) == (1.0, 9.0)


def test_float32_is_exact_on_a_cpu_alone_unless_jax_is_told_so(monkeypatch):
    assert rescore.find_bounds(make_config()) == rescore.BOUNDS["float32"]
    monkeypatch.setattr(rescore.jax, "default_backend", lambda: "gpu")
    assert rescore.find_bounds(make_config()) == rescore.BOUNDS["bfloat16"]
    with jax.default_matmul_precision("highest"):
        assert rescore.find_bounds(make_config()) == rescore.BOUNDS["float32"]
        assert rescore.find_bounds(make_config(dtype="bfloat16")) == rescore.BOUNDS["bfloat16"]


def test_samples_have_log_probabilities_only_if_that_is_asked_for():
    sample = dataclasses.replace(make_sample(PROMPTS[0], 0, 1), logps=(-1.0,), sum_logps=-1.0)
    (plain,) = rescore.drop_logps(make_config(), [sample])
    assert plain == dataclasses.replace(sample, logps=None)
    sampling = SamplingConfig(keep_logps=True)
    assert rescore.drop_logps(Config(sampling=sampling), [sample]) == [sample]


def test_nothing_is_re_scored_where_no_sample_can_be(caplog):
    caplog.set_level("INFO")
    run = make_run(config=make_config())
    old = make_sample(PROMPTS[0], 0, 1)
    chosen = {PROMPTS[0].prompt_id}
    assert rescore.rescore(run, {}, [old], chosen, round=1) == ([], None)
    assert "none of its samples is re-scored" in caplog.text
    caplog.clear()
    assert rescore.rescore(run, {}, [old], (), round=1) == ([], None) and not caplog.text
    short = dataclasses.replace(make_config(), train=TrainConfig(tokens_per_device=1))
    long = dataclasses.replace(old, logps=(-1.0,), response_ids=(5,))
    assert rescore.rescore(make_run(config=short), {}, [long], chosen, round=1) == ([], None)


def test_a_stage_has_the_result_of_re_scoring_too():
    done = StageResult({"samples.jsonl": 2}, {"samples": 2})
    assert Rescoring().add_to(done, []) == done and Rescoring().run([]) == NOTHING
    more = Rescoring(run=lambda samples: StageResult({"x": 1}, {"rescore_max": len(samples)}))
    assert more.add_to(done, ["a"]) == StageResult(
        {"samples.jsonl": 2, "x": 1}, {"samples": 2, "rescore_max": 1}
    )
