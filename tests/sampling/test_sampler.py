"""The sampler: independence of samples, agreement with the trainer, and where a response ends."""

import dataclasses
import functools
import itertools
import logging
import types

import jax
import numpy as np
import pytest

from halos_jax.config import SamplingConfig
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.lengths import Lengths
from halos_jax.data.records import formats
from halos_jax.data.tokenize import make_scored_items
from halos_jax.data.toy import make_tokenizer
from halos_jax.metrics import NonFiniteError
from halos_jax.models import decoder
from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig, RopeConfig, init_params, params_shardings
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.sampling import decode, schedule
from halos_jax.sampling import sampler as sampling
from halos_jax.sampling.draws import DecodeSettings
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.sampling.schedule import Draft
from halos_jax.types import TARGET, Item, Prompt, Turn
from tests.logits import compute_logits

SETTINGS = SamplingConfig(
    num_samples_per_prompt=3,
    temperature=1.0,
    top_p=0.9,
    max_tokens=12,
    max_prompt_length=16,
    slots=8,
    chunk=5,
    keep_logps=True,
)


@functools.cache
def renderer():
    return make_renderer(make_tokenizer("abcdefghij"))


def tiny(**changes):
    config = DecoderConfig(
        vocab_size=len(renderer().tokenizer),
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_mlp=48,
        init_std=0.3,
    )
    return dataclasses.replace(config, **changes)


def make_prompts(count=7):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 9))) for _ in range(count)]
    return [Prompt(f"p{i}", (Turn("user", text),)) for i, text in enumerate(texts)]


def run(mesh, settings=SETTINGS, prompts=None, *, seed=0, round=1, config=None):
    config = config or tiny()
    with jax.set_mesh(mesh):
        params = jax.device_put(
            init_params(jax.random.key(0), config), params_shardings(config, mesh)
        )
        sampler = make_sampler(settings, renderer(), config, mesh)
        samples = sample_shard(
            sampler,
            sampler.unstack(params),
            prompts or make_prompts(),
            seed=seed,
            round=round,
            generator="me",
            on_sample=(counts := []).append,
        )
    # Each is told of once, when it is finished, and says whose it is.
    assert sum(counts) == len(samples) and 0 not in counts
    assert {sample.generator for sample in samples} == {"me"}
    return samples


def by_name(samples):
    return {(sample.prompt.prompt_id, sample.sample_id): sample.response_ids for sample in samples}


@pytest.fixture(scope="module")
def reference():
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    return run(mesh)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_sampled(temperature, caplog):
    """Of a padded vocabulary the samples are tokens alone, its end token among them."""
    size = len(renderer().tokenizer)
    settings = dataclasses.replace(SETTINGS, temperature=temperature, top_p=1.0)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    with caplog.at_level(logging.INFO):
        samples = run(mesh, settings, config=tiny(vocab_size=5 * size))
    assert f"{4 * size} of {5 * size} rows of the vocabulary have no token" in caplog.text
    assert max(max(sample.response_ids) for sample in samples) < size
    assert temperature == 0 or {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_a_sampler_is_compiled_for_what_the_config_says(monkeypatch):
    asked = []
    monkeypatch.setattr(
        decode, "compile_decoder", lambda *given: asked.append(given) or (None,) * 6
    )
    settings = SamplingConfig(
        temperature=0.7, top_k=5, top_p=0.8, max_tokens=6, chunk=9, stop=("x",)
    )
    size = len(renderer().tokenizer)
    spoken = types.SimpleNamespace(
        token_ids=renderer().token_ids, stop_ids={3, 1}, stop_strings=("y",)
    )
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    made = make_sampler(settings, spoken, tiny(remat="full", vocab_size=size + 2), mesh)
    expected = DecodeSettings(
        temperature=0.7, top_k=5, top_p=0.8, max_tokens=6, chunk=6, stop_ids=(1, 3)
    )
    expected = dataclasses.replace(expected, unknown=((size, size + 2),))
    assert asked[0][:2] == (expected, tiny(vocab_size=size + 2)) and made.stop_strings == ("x", "y")


def test_samples_beyond_the_models_angles_are_refused(mesh1):
    settings = SamplingConfig(max_prompt_length=10, max_tokens=6)
    short = tiny(rope=RopeConfig(longest=15))
    with pytest.raises(ModelError, match=r"sampling\.max_tokens: got 16, allowed: 15 at most"):
        make_sampler(settings, renderer(), short, mesh1)


def test_every_sample_once_and_complete(reference):
    assert [(s.prompt.prompt_id, s.sample_id) for s in reference] == [
        (f"p{i}", j) for i in range(7) for j in range(3)
    ]
    stop_ids = renderer().stop_ids
    for sample in reference:
        assert 1 <= len(sample.response_ids) <= SETTINGS.max_tokens
        assert not stop_ids & set(sample.response_ids[:-1])
        ended = sample.response_ids[-1] in stop_ids
        assert sample.finish_reason == ("stop" if ended else "length")
        assert ended or len(sample.response_ids) == SETTINGS.max_tokens
        assert sample.prompt_ids == renderer().render_prompt(sample.prompt.turns, 16)
    reasons = {sample.finish_reason for sample in reference}
    assert reasons == {"stop", "length"}  # both ways to end are exercised
    assert len(set(by_name(reference).values())) > 15  # samples of a prompt differ


@pytest.mark.parametrize(
    "changes", [{"slots": 1}, {"slots": 64, "chunk": 32}, {"slots": 4, "chunk": 1}]
)
def test_samples_do_not_depend_on_slots_or_chunks(mesh1, reference, changes):
    again = run(mesh1, dataclasses.replace(SETTINGS, **changes))
    assert by_name(again) == by_name(reference)


@pytest.mark.parametrize("shards", ["mesh1", "mesh"])
def test_slots_shrink_at_the_tail_without_any_difference(shards, mesh1, request, monkeypatch):
    prompts = make_prompts(8)
    expected = by_name(run(mesh1, prompts=prompts))
    monkeypatch.setattr(schedule, "FEWEST_SLOTS", 2)
    sizes = []
    real = sampling._shrink

    def shrink(sampler, shard):
        real(sampler, shard)
        busy = sum(draft is not None for draft in shard.owners)
        sizes.append((len(shard.owners), len(shard.slots.token), busy))

    monkeypatch.setattr(sampling, "_shrink", shrink)
    settings = dataclasses.replace(SETTINGS, slots=16, shrink=2, chunk=1)
    again = run(request.getfixturevalue(shards), settings, prompts)
    assert by_name(again) == expected
    assert len({size for size, *_ in sizes}) >= 3
    assert all(size == held and busy <= size for size, held, busy in sizes)


def test_samples_do_not_depend_on_order_or_company(mesh1, reference):
    prompts = make_prompts()
    expected = by_name(reference)
    assert by_name(run(mesh1, prompts=prompts[::-1])) == expected
    some = by_name(run(mesh1, prompts=prompts[4:5]))
    assert some == {name: ids for name, ids in expected.items() if name[0] == "p4"}
    fewer = by_name(run(mesh1, dataclasses.replace(SETTINGS, num_samples_per_prompt=2)))
    assert fewer == {name: ids for name, ids in expected.items() if name[1] < 2}


def test_samples_do_not_depend_on_the_mesh(mesh, reference):
    assert by_name(run(mesh)) == by_name(reference)


def test_seed_and_round_change_the_samples(mesh1, reference):
    for other in (run(mesh1, seed=1), run(mesh1, round=2)):
        same = sum(a == b for a, b in zip(by_name(other).values(), by_name(reference).values()))
        assert same < len(reference) / 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.15)])
def test_logps_and_entropies_equal_the_trainers(mesh1, dtype, tolerance):
    config = tiny(compute_dtype=dtype)
    samples = run(mesh1, config=config)
    items = [
        Item(
            np.asarray(sample.prompt_ids, np.int32),
            (np.asarray(sample.response_ids, np.int32),),
            (TARGET,),
        )
        for sample in samples
    ]
    plan = plan_batches(items, batch_size=99, num_rows=1, tokens_per_row=4096, row_multiple=8)
    batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
    params = init_params(jax.random.key(0), config)
    hidden = decoder.encode_responses(params, batch, config)
    logps, entropies = (
        np.asarray(one)[0] for one in decoder.compute_statistics(params, hidden, batch, config)
    )
    start = 0
    for index in plan.steps[0][0]:
        length = len(samples[index].response_ids)
        np.testing.assert_allclose(
            samples[index].logps, logps[start : start + length], atol=tolerance
        )
        assert samples[index].sum_logps == pytest.approx(sum(samples[index].logps), abs=1e-9)
        mean = entropies[start : start + length].mean()
        assert samples[index].mean_entropy == pytest.approx(mean, abs=tolerance)
        start += length


EXACT = dataclasses.replace(SETTINGS, exact_ratios=True, keep_logps=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7, "top_p": 0.9, "max_kept": 6},
        {"temperature": 1.3, "top_p": 1.0, "top_k": 4, "stop": ("a", "b", "c")},
        {"temperature": 1.3, "top_p": 1.0},
    ],
)
def test_exact_samples_say_what_the_trainer_makes_of_their_sets(mesh1, changes):
    """The trainer's head, given what the samples were drawn from, finds their log-probabilities."""
    size = len(renderer().tokenizer)
    config = tiny(vocab_size=5 * size, unknown_rows=((size, 5 * size),))  # most rows have no token
    samples = run(mesh1, dataclasses.replace(EXACT, **changes), config=config)
    assert {one.drawn.temperature for one in samples} == {changes["temperature"]}
    assert all(one.logps is None for one in samples)
    records = [formats.sample_from_record(formats.sample_to_record(one)) for one in samples]
    assert [one.drawn for one in records] == [one.drawn for one in samples]
    scored = [dataclasses.replace(one, reward=1.0) for one in records]
    items = make_scored_items(scored, renderer(), Lengths(64, 32))
    plan = plan_batches(items, batch_size=99, num_rows=1, tokens_per_row=4096, row_multiple=8)
    batch = jax.tree.map(lambda x: x[0], build_batch(items, plan, 0))
    params = init_params(jax.random.key(0), config)
    found = np.asarray(decoder.compute_logps(params, batch, config))
    np.testing.assert_allclose(found, batch.old_logps, atol=2e-5)
    most = max(max(one.drawn.kept_counts, default=0) for one in samples)
    assert most == changes.get("max_kept", changes.get("top_k", 0))
    plain = decoder.compute_logps(params, dataclasses.replace(batch, transform=None), config)
    assert np.abs(np.asarray(plain) - batch.old_logps).max() > 0.3, "the test shows nothing"


def test_exact_samples_do_not_depend_on_the_mesh_or_slots(mesh, mesh1):
    expected = run(mesh1, EXACT)
    for other in (run(mesh, EXACT), run(mesh1, dataclasses.replace(EXACT, slots=3, chunk=2))):
        assert by_name(other) == by_name(expected)
        for one, same in zip(other, expected, strict=True):
            assert one.drawn.kept_ids == same.drawn.kept_ids
            np.testing.assert_allclose(one.drawn.logps, same.drawn.logps, atol=1e-5)


def test_a_draw_from_the_policy_itself_keeps_its_plain_log_probs(mesh1):
    settings = dataclasses.replace(EXACT, top_p=1.0)
    plain = dataclasses.replace(settings, exact_ratios=False, keep_logps=True)
    assert run(mesh1, settings) == run(mesh1, plain)
    greedy = run(mesh1, dataclasses.replace(settings, temperature=0.0))
    assert all(one.drawn is None for one in greedy)


def test_greedy_takes_the_likeliest_token(mesh1):
    config = tiny()
    samples = run(mesh1, dataclasses.replace(SETTINGS, temperature=0.0, num_samples_per_prompt=1))
    params = init_params(jax.random.key(0), config)
    for sample in samples[:3]:
        tokens = np.array([sample.prompt_ids + sample.response_ids])
        logits = compute_logits(params, tokens, np.array([tokens.shape[1]]), config)
        first = len(sample.prompt_ids) - 1
        best = np.asarray(logits.argmax(-1))[0, first:-1]
        assert tuple(best) == sample.response_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_nothing_can_be_drawn_from_are_an_error(mesh1, temperature):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    with pytest.raises(NonFiniteError, match="NaN or infinite logits for prompt p0, sample 0"):
        run(mesh1, settings, config=tiny(init_std=float("nan")))


def test_stop_strings_end_a_response_where_they_are_complete(mesh1, reference):
    text = next(s.output for s in reference if len(s.output) >= 6 and s.finish_reason == "length")
    stop = text[2:4]
    stopped = run(mesh1, dataclasses.replace(SETTINGS, stop=(stop,)))
    cut = 0
    for sample, full in zip(stopped, reference, strict=True):
        assert stop not in sample.output
        assert len(sample.logps) == len(sample.response_ids)
        np.testing.assert_allclose(sample.logps, full.logps[: len(sample.response_ids)], atol=1e-5)
        assert sample.sum_logps == pytest.approx(sum(sample.logps), abs=1e-9)
        if stop in full.output:
            cut += 1
            assert sample.finish_reason == "stop"
            assert sample.output == full.output.partition(stop)[0]
            assert sample.response_ids == full.response_ids[: len(sample.response_ids)]
            assert renderer().decode_response(sample.response_ids).endswith(stop)
        else:
            assert sample.response_ids == full.response_ids
    assert cut


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_stop_string_is_found_across_chunks(chunk):
    """Whatever a chunk boundary divides: each token is a letter, and the chunks end anywhere."""
    tokens = renderer().render_response("abcdefga", finished=False)
    for first, last in itertools.combinations(range(len(tokens) - 1), 2):
        stop = renderer().decode_response(tokens[first : last + 1])
        sampler = types.SimpleNamespace(
            renderer=renderer(), stop_strings=("zz", stop), settings=SETTINGS, stop_ids=(0,)
        )
        draft = Draft(make_prompts(1)[0], (1,), 0, 0, key=np.zeros(2, np.uint32))
        for start in range(0, len(tokens), chunk):
            drawn = tokens[start : start + chunk]
            padding = [0] * (chunk - len(drawn))
            output = decode.ChunkOutput(
                tokens=np.array([[*drawn, *padding]], np.int32),
                logps=-np.array([[*range(start, start + len(drawn)), *padding]], np.float32),
                entropies=np.array([[*range(start, start + len(drawn)), *padding]], np.float32),
                count=np.array([len(drawn)], np.int32),
                done=np.array([start + chunk >= len(tokens)]),
            )
            sampling._collect(sampler, sampling._Chunk(output, [draft]), lambda count: None)
        assert draft.finish_reason == "stop"
        assert tuple(draft.ids) == tuple(tokens[: last + 1])
        assert draft.logps == [-number for number in range(last + 1)]
        assert draft.entropies == [*range(last + 1)]


def test_a_prefix_stands_behind_the_prompt_and_within_its_length(mesh1, reference):
    settings = dataclasses.replace(SETTINGS, prefix="ab", max_prompt_length=8)
    samples = run(mesh1, settings, make_prompts()[:2])
    for sample in samples:
        prefix = renderer().render_response("ab", finished=False)
        prompt = renderer().render_prompt(sample.prompt.turns, 8 - len(prefix))
        assert sample.prompt_ids == (*prompt, *prefix)
        assert sample.output == renderer().decode_response(sample.response_ids)
    assert by_name(samples).items() - by_name(reference).items()
