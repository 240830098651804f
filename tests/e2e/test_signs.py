"""Vital signs against sums over every response that a tiny policy can give."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import Config, RoundsConfig, SamplingConfig, TrainConfig
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.toy import make_tokenizer
from halos_jax.losses import get_loss
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from halos_jax.rounds.watch import watched
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.signs import fresh
from halos_jax.signs.staleness import measure_staleness
from halos_jax.training import loop as training
from halos_jax.types import Prompt, Sample, Turn
from tests.logits import compute_logits
from tests.rounds.stand_ins import make_run

RENDERER = make_renderer(make_tokenizer("ab"))
TINY = DecoderConfig(
    vocab_size=len(RENDERER.tokenizer),
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_mlp=24,
    init_std=0.3,
)
LONGEST = 3
SAMPLING = SamplingConfig(
    num_samples_per_prompt=150,
    temperature=1.0,
    top_p=1.0,
    max_tokens=LONGEST,
    max_prompt_length=12,
    slots=64,
    chunk=3,
)
CONFIG = Config(
    progress=False,
    sampling=SAMPLING,
    rounds=RoundsConfig(watch_samples=-1),
    train=TrainConfig(max_length=16, row_multiple=64, tokens_per_device=1024),
)
PROMPTS = [Prompt(name, (Turn("user", name),)) for name in ("ab", "b", "aab")]


def make_params(mesh, seed, mixed=1.0):
    """Return params between those of two seeds, in which `mixed` is the share of the second."""
    first, second = (init_params(jax.random.key(one), TINY) for one in (0, seed))
    params = jax.tree.map(lambda x, y: (1 - mixed) * x + mixed * y, first, second)
    return jax.device_put(params, params_shardings(TINY, mesh))


@pytest.fixture(scope="module")
def run():
    """Return a run on one device that has a trainer, and the mesh that it is on."""
    mesh = jax.make_mesh(
        (1, 1, 1), sharding.MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    trainer = training.make_trainer(CONFIG, TINY, get_loss({"name": "dpo"}), mesh, total_steps=1)
    made = make_run(config=CONFIG, trainer=trainer)
    with jax.set_mesh(mesh):
        yield made, mesh


def list_conditionals(params, prompt_ids):
    """Return log p(token | prompt, prefix) f64[V] of every prefix that a response can go on from.

    From logits of whole sequences, without cache, packing or sampler.
    """
    ends, conditionals, prefixes = set(RENDERER.stop_ids), {}, [()]
    for _ in range(LONGEST):
        tokens = np.array([[*prompt_ids, *prefix] for prefix in prefixes], np.int32)
        lengths = np.full(len(tokens), tokens.shape[1], np.int32)
        logits = np.asarray(compute_logits(params, tokens, lengths, TINY), np.float64)
        rows = logits[:, -1] - np.log(np.exp(logits[:, -1]).sum(axis=-1, keepdims=True))
        conditionals |= dict(zip(prefixes, rows, strict=True))
        prefixes = [
            (*prefix, token)
            for prefix in prefixes
            for token in range(TINY.vocab_size)
            if token not in ends
        ]
    return conditionals


def list_responses(conditionals):
    """Return the log-probability of every response."""
    ends, found = set(RENDERER.stop_ids), {}

    def extend(prefix, logp):
        for token, one in enumerate(conditionals[prefix]):
            response = (*prefix, token)
            if token in ends or len(response) == LONGEST:
                found[response] = logp + one
            else:
                extend(response, logp + one)

    extend((), 0.0)
    return found


def sum_by_chain(policy, other):
    """Return KL(policy || other) and the policy's entropy, of whole responses, by the chain rule:
    the sum over prefixes of their probability times that of the next token's distribution."""
    ends, divergence, entropy = set(RENDERER.stop_ids), 0.0, 0.0
    reached = {(): 1.0}
    for prefix, logps in policy.items():
        shares = np.exp(logps)
        divergence += reached[prefix] * (shares @ (logps - other[prefix]))
        entropy -= reached[prefix] * (shares @ logps)
        for token, share in enumerate(shares):
            if token not in ends:
                reached[*prefix, token] = reached[prefix] * share
    return divergence, entropy


def test_divergence_entropy_and_staleness_are_those_of_all_responses(run):
    made, mesh = run
    policy, sft, now = (
        make_params(mesh, 0),
        make_params(mesh, 1, mixed=0.4),
        make_params(mesh, 2, mixed=0.1),
    )
    sampler = make_sampler(SAMPLING, RENDERER, TINY, mesh)
    drawn = sample_shard(sampler, sampler.unstack(policy), PROMPTS, seed=0, round=1)
    sums = {
        name: watched.compute_sums(made, drawn, params, label=name)
        for name, params in (("sft", sft), ("now", now))
    }
    exact = {"kl": [], "entropy": [], "tokens": [], "stale": [], "reverse": [], "share": []}
    for prompt in PROMPTS:
        ids = next(one.prompt_ids for one in drawn if one.prompt is prompt)
        old, reference, new = (list_conditionals(one, ids) for one in (policy, sft, now))
        responses, after = list_responses(old), list_responses(new)
        assert sum(map(math.exp, responses.values())) == pytest.approx(1.0)
        # The trainer's pass over all of them, weighed by their probability, gives the very sum.
        every = [
            Sample(prompt, k, "", ids, response, "stop", sum_logps=logp)
            for k, (response, logp) in enumerate(responses.items())
        ]
        found = watched.compute_sums(made, every, sft, label="all")
        mean = sum(math.exp(s.sum_logps) * (s.sum_logps - f) for s, f in zip(every, found))
        divergence, entropy = sum_by_chain(old, reference)
        assert mean == pytest.approx(divergence, abs=2e-5)
        exact["kl"].append(divergence)
        exact["entropy"].append(entropy)
        exact["tokens"].append(sum(math.exp(p) * len(s) for s, p in responses.items()))
        exact["stale"].append(sum_by_chain(old, new)[0])
        exact["reverse"].append(sum_by_chain(new, old)[0])
        exact["share"].append(sum(math.exp(2 * after[s] - p) for s, p in responses.items()))
        # What the sampler says of a response is its log-probability.
        for one in drawn:
            if one.prompt is prompt:
                assert one.sum_logps == pytest.approx(responses[one.response_ids], abs=1e-4)
    # Three prompts are given here, not drawn: each sample is a draw of its own.
    alone = [str(number) for number in range(len(drawn))]
    lengths = [len(one.response_ids) for one in drawn]
    old_sums = [one.sum_logps for one in drawn]
    ratios = [old - one for old, one in zip(old_sums, sums["sft"], strict=True)]
    signs = dict(fresh.measure_divergence(ratios, lengths, alone, name="kl_sft"))
    named = [
        dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, prompt_id=name))
        for one, name in zip(drawn, alone, strict=True)
    ]
    signs["entropy"] = fresh.measure_responses(named)["entropy"]
    moved = [one - old for old, one in zip(old_sums, sums["now"], strict=True)]
    signs |= measure_staleness(moved, lengths, alone, is_exact=True)
    means = {name: np.mean(values) for name, values in exact.items()}
    expected = {
        "kl_sft": means["kl"],
        "kl_sft_per_token": means["kl"] / means["tokens"],
        "entropy": means["entropy"] / means["tokens"],
        "kl_stale": means["stale"],
        "kl_stale_per_token": means["stale"] / means["tokens"],
        "kl_stale_reverse": means["reverse"],
    }
    for name, value in expected.items():
        assert abs(signs[name].value - value) < 3 * signs[name].error, name
        assert 0 < signs[name].error < value / 2, name  # narrow enough to say something
    assert signs["stale_ess"] == pytest.approx(1 / means["share"], rel=0.1)


def test_a_mesh_of_eight_gives_the_signs_of_one_device(run, mesh):
    made, single = run
    drawn = [
        Sample(prompt, k, "", (1, 3 + k % 2), (4, 3 + k % 3, 2), "stop", sum_logps=-4.0)
        for prompt in PROMPTS
        for k in range(4)
    ]
    with jax.set_mesh(single):
        alone = watched.compute_sums(made, drawn, make_params(single, 1), label="one")
    trainer = training.make_trainer(CONFIG, TINY, made.trainer.loss, mesh, total_steps=1)
    with jax.set_mesh(mesh):
        spread = watched.compute_sums(
            dataclasses.replace(made, trainer=trainer), drawn, make_params(mesh, 1), label="eight"
        )
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
