"""What drew the samples of a round, and whether that is the round's policy."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from halos_jax.checkpoints.position import Position
from halos_jax.config import Config, ModelConfig, TrainConfig
from halos_jax.models import cache
from halos_jax.models.lora import Frozen, merge_adapter
from halos_jax.models.spec import DecoderConfig, init_params
from halos_jax.policies import digest
from halos_jax.policies.source import Source
from halos_jax.rounds.proof import origin as origins
from halos_jax.rounds.proof.origin import UNKNOWN, Origin, OriginError
from halos_jax.workdir.manifests import Manifest, round_folder, save_manifest
from tests.models.test_lora import CONFIGS, draw_adapter, make_frozen
from tests.rounds.stand_ins import PROMPTS, make_sample

TINY = DecoderConfig(61, 2, 16, 2, 1, 8, 24, init_std=0.2, compute_dtype=jnp.bfloat16)
SFT = Manifest(0, trained="a" * 32, executed={"evaluate": ("x",)})


def test_a_sampler_with_other_weights_is_refused():
    params = init_params(jax.random.key(0), TINY)
    origin = origins.identify(params, None, TINY)
    assert origin.fingerprint == digest.fingerprint(params)
    origins.check_weights(origin, cache.unstack_layers(params, TINY), TINY, "samples, round 3")
    layers = params["layers"]
    moved = {**params, "layers": {**layers, "up": layers["up"].at[1].multiply(1.01)}}
    weights = cache.unstack_layers(moved, TINY)
    with pytest.raises(OriginError) as error:
        origins.check_weights(origin, weights, TINY, "samples, round 3")
    for part in ("samples, round 3: ", origin.fingerprint[:12], "layers.up (layers 1)", "allowed"):
        assert part in str(error.value)
    origins.check_weights(UNKNOWN, weights, TINY, "samples")
    # A whole other policy does not fill the screen.
    other = cache.unstack_layers(jax.tree.map(lambda x: -x, params), TINY)
    with pytest.raises(OriginError, match=r" and \d+ more; allowed"):
        origins.check_weights(origin, other, TINY, "samples")


@pytest.mark.parametrize("family", ["llama"])
def test_the_weights_that_no_adapter_changes_are_checked_too(family):
    frozen, config = make_frozen(family), CONFIGS[family]
    params = draw_adapter(frozen, family)
    origin = origins.identify(params, frozen, config)
    assert origin.fingerprint == digest.fingerprint(params, frozen)
    assert "embed" in origin.folded and "layers.q" not in origin.folded
    weights = cache.unstack_layers(merge_adapter(params, frozen), config)
    origins.check_weights(origin, weights, config, "samples")
    base = {**frozen.base, "embed": frozen.base["embed"] * 1.01}
    other = cache.unstack_layers(merge_adapter(params, Frozen(base, frozen.adapter)), config)
    with pytest.raises(OriginError, match="embed"):
        origins.check_weights(origin, other, config, "samples")


def test_a_round_samples_with_the_policy_that_the_round_before_ended_with(caplog):
    now = Manifest(3)
    before = Manifest(2, trained="b" * 32)
    origins.check_policy(3, "b" * 32, before, now)
    for unknown in (None, Manifest(2)):
        origins.check_policy(3, "c" * 32, unknown, now)
    with pytest.raises(OriginError, match=r"round 3: .* is cccccccccccc, but round 2 ended with b"):
        origins.check_policy(3, "c" * 32, before, now)
    # The start of a run may be drawn or averaged: elsewhere it may be rounded otherwise.
    with pytest.raises(OriginError, match="round 0 ended with"):
        origins.check_policy(1, "c" * 32, SFT, Manifest(1, executed={"sample": ("x",)}))
    with caplog.at_level(logging.WARNING):
        origins.check_policy(1, "c" * 32, SFT, Manifest(1, executed={"sample": ("y",)}))
    assert "its start is not the same to the bit" in caplog.text


def test_the_stages_refuse_samples_of_another_policy():
    drawn = Manifest(1, sampled_by={"samples.jsonl": "c" * 32}, executed={"sample": ("x",)})
    with pytest.raises(OriginError, match=r"samples.jsonl was drawn by the policy cccccccccccc"):
        origins.check_samples(drawn, "samples.jsonl", SFT)
    elsewhere = dataclasses.replace(drawn, executed={"sample": ("y",)})
    own = dataclasses.replace(drawn, sampled_by={"samples.jsonl": SFT.trained})
    for manifest, before in ((elsewhere, SFT), (own, SFT), (drawn, None), (Manifest(1), SFT)):
        origins.check_samples(manifest, "samples.jsonl", before)
    with pytest.raises(OriginError, match="ended with the policy cccc"):
        origins.check_trained(Manifest(1, trained="c" * 32), "d" * 32)
    for manifest in (Manifest(1), Manifest(1, trained="d" * 32)):
        origins.check_trained(manifest, "d" * 32)


def test_the_parts_of_a_round_are_of_one_policy():
    origins.check_alike(Manifest(1, sampled_by={"a": "c", "b": "c"}))
    with pytest.raises(OriginError, match="several policies, c, d"):
        origins.check_alike(Manifest(1, sampled_by={"a": "c", "b": "d"}))
    assert origins.name_sampled(Origin("c"), "a", "b") == {"sampled_by": {"a": "c", "b": "c"}}
    assert origins.name_sampled(UNKNOWN, "a") == {"sampled_by": {}}


def test_a_shard_of_another_policy_is_drawn_again(tmp_path, caplog):
    caplog.set_level("INFO")
    path, one, other = tmp_path / "samples.shard-0000.jsonl", Origin("c" * 32), Origin("d" * 32)
    samples = [make_sample(prompt, 0, 1) for prompt in PROMPTS[:2]]
    assert origins.find_shard(path, PROMPTS[:2], 1, one) is None
    rows = list(origins.mark_rows(samples, one))
    assert all(row["sampled_by"] == one.fingerprint for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for known in (one, UNKNOWN):
        assert origins.find_shard(path, PROMPTS[:2], 1, known) == samples
    assert origins.find_shard(path, PROMPTS[:2], 1, other) is None
    assert "was drawn by the policy cccccccccccc, and this is dddddddddddd" in caplog.text
    assert origins.find_shard(path, PROMPTS[1:3], 1, one) is None
    path.write_text("".join(json.dumps(row) + "\n" for row in origins.mark_rows(samples, UNKNOWN)))
    assert origins.find_shard(path, PROMPTS[:2], 1, one) == samples  # by an earlier version


AT_THE_END = Position(9, 1)


def test_a_policy_of_a_run_is_held_against_the_manifest_of_its_round(tmp_path, caplog):
    def check(found, *, place=AT_THE_END, ema=0.0):
        run = Config(workdir=str(tmp_path), train=TrainConfig(ema_decay=ema))
        source = Source("runs/a", ModelConfig(), tmp_path, run, 1, place)
        origins.check_source(source, found)

    check("c" * 32)  # the round has no manifest
    for round, marks in ((0, {}), (1, {}), (2, {"eval.jsonl": "e" * 32})):
        folder = round_folder(tmp_path, round)
        folder.mkdir(parents=True)
        save_manifest(folder, Manifest(round, trained="d" * 32, sampled_by=marks))
    check("d" * 32 + "+another base")
    for found, place in (("c" * 32, AT_THE_END), ("d" * 32, Position(9, 2))):
        with pytest.raises(OriginError, match=r"runs/a: its policy is .* of round \d it is"):
            check(found, place=place)
    # The average of the params is what is evaluated and exported, but not what a round ends with.
    check("c" * 32, ema=0.9)
    check("e" * 32, place=Position(9, 2), ema=0.9)
    check("c" * 32, place=Position(9, 1, in_stage=True))
    origins.check_source(Source("model", ModelConfig()), "c" * 32)
    assert caplog.text == ""
    check("c" * 32, place=Position(0, 0))
    assert "in the manifest of round 0 it is dddddddddddd" in caplog.text
