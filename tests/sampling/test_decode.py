"""Decoding: what is drawn, what a draw depends on, and what the slots do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from halos_jax.sampling import decode
from halos_jax.sampling.draws import DecodeSettings
from tests.logits import compute_logits

TINY = DecoderConfig(
    vocab_size=61,
    num_layers=1,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=48,
    init_std=0.3,
)
PLAIN = DecodeSettings(
    temperature=1.0, top_k=0, top_p=1.0, max_tokens=9, chunk=4, stop_ids=(3, 5, 11)
)
FILTERED = dataclasses.replace(PLAIN, temperature=0.8, top_k=30, top_p=0.95)
SHORTER = dataclasses.replace(FILTERED, chunk=3)
# (prompt tokens, the 64-bit number of the prompt, sample ids)
PROMPTS = [
    ([7, 8, 9, 10], 2**63 + 5, (0, 1, 2)),
    ([12], 77, (0, 1)),
    ([20, 21, 22, 23, 24, 25], 2**40, (0, 3)),
]


def test_a_key_is_a_function_of_seed_round_prompt_and_sample():
    def key(seed=0, round=1, prompt=2**63 + 2**33 + 5, sample=2):
        return tuple(np.asarray(decode.derive_keys(seed, round, [prompt], [sample]))[0].tolist())

    changed = [
        key(),
        key(seed=1),
        key(round=2),
        key(prompt=2**63 + 2**33 + 4),
        key(prompt=2**63 + 2**34 + 5),  # differs above the lower 32 bits alone
        key(sample=3),
        key(round=0, sample=1),
    ]
    assert len(set(changed)) == len(changed)
    assert key() == key()


def test_keys_do_not_depend_on_their_neighbours():
    prompts, samples = [2**64 - 1, 0, 5, 5, 2**32], [0, 1, 0, 1, 7]
    together = np.asarray(decode.derive_keys(3, 4, prompts, samples))
    assert together.dtype == np.uint32 and together.shape == (5, 2)
    order = [4, 2, 0, 3, 1]
    shuffled = decode.derive_keys(3, 4, [prompts[i] for i in order], [samples[i] for i in order])
    np.testing.assert_array_equal(shuffled, together[order])
    assert len({tuple(row) for row in together.tolist()}) == 5


@functools.cache
def make_params():
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), TINY))


@functools.cache
def derive_key(number, sample):
    return np.asarray(decode.derive_keys(0, 1, [number], [sample]))[0]


@functools.cache
def compile_logits():
    return jax.jit(functools.partial(compute_logits, config=TINY))


def prefill(weights, compiled):
    length = 8
    tokens = np.zeros((len(PROMPTS), length), np.int32)
    lengths = np.zeros(len(PROMPTS), np.int32)
    for row, (ids, _, _) in enumerate(PROMPTS):
        tokens[row, : len(ids) - 1] = ids[:-1]
        lengths[row] = len(ids) - 1
    return compiled(weights, tokens, lengths)


@functools.cache
def compile_all(settings, mesh):
    """Return the compiled functions and the weights on `mesh`, which must be the one in force."""
    compiled = decode.compile_decoder(settings, TINY, sharding.replicated(mesh))
    params = jax.device_put(make_params(), params_shardings(TINY, mesh))
    return *compiled[:4], compiled[4](params)


@functools.cache
def sample_all(mesh, num_slots, settings=FILTERED, order=1):
    """Sample all of PROMPTS through `num_slots` slots; return {(prompt, sample): (ids, logps)}."""
    init, run_prefill, admit, decode_chunk, weights = compile_all(settings, mesh)
    keys, values = prefill(weights, run_prefill)
    slots = init(slots=num_slots, length=8 + settings.max_tokens)
    jobs = [(row, sample) for row, (*_, samples) in enumerate(PROMPTS) for sample in samples]
    waiting = jobs[::order]
    owner, found = [None] * num_slots, {}
    while len(found) < len(jobs):
        free = [slot for slot, job in enumerate(owner) if job is None]
        entering = list(zip(free, waiting))
        del waiting[: len(entering)]
        admission = decode.Admission(
            slot=np.full(num_slots, num_slots, np.int32),
            source=np.zeros(num_slots, np.int32),
            token=np.zeros(num_slots, np.int32),
            position=np.zeros(num_slots, np.int32),
            key=np.zeros((num_slots, 2), np.uint32),
        )
        for row, (slot, job) in enumerate(entering):
            ids, number, _ = PROMPTS[job[0]]
            admission.slot[row], admission.source[row] = slot, job[0]
            admission.token[row], admission.position[row] = ids[-1], len(ids) - 1
            admission.key[row] = derive_key(number, job[1])
            owner[slot] = (job, [], [])
        slots = admit(slots, keys, values, admission, np.zeros(num_slots, bool))
        before = slots
        slots, output = decode_chunk(weights, slots)
        assert before.token.is_deleted(), "the slots were not donated"
        output = jax.device_get(output)
        np.testing.assert_array_equal(output.done, slots.done)
        for slot, job in enumerate(owner):
            count = output.count[slot]
            assert not output.tokens[slot, count:].any() and not output.logps[slot, count:].any()
            if job is None:
                assert count == 0 and output.done[slot]
                continue
            job[1].extend(output.tokens[slot, :count].tolist())
            job[2].extend(output.logps[slot, :count].tolist())
            if output.done[slot]:
                found[job[0]] = job[1:]
                owner[slot] = None
    return found


@pytest.fixture
def single(mesh1):
    with jax.set_mesh(mesh1):
        yield mesh1


def test_a_sample_does_not_depend_on_slots_order_or_chunk(single):
    expected = sample_all(single, 7)
    for got in (sample_all(single, 7, order=-1), sample_all(single, 2, SHORTER)):
        assert got.keys() == expected.keys()
        for job, (ids, logps) in got.items():
            assert ids == expected[job][0]
            np.testing.assert_allclose(logps, expected[job][1], atol=1e-5)
    # Samples of one prompt differ from each other.
    assert len({tuple(ids) for ids, _ in expected.values()}) == len(expected)


def test_a_sample_does_not_depend_on_the_mesh(mesh, mesh1):
    with jax.set_mesh(mesh1):
        expected = sample_all(mesh1, 7)
    got = sample_all(mesh, 8)
    assert {job: ids for job, (ids, _) in got.items()} == {
        job: ids for job, (ids, _) in expected.items()
    }


def test_samples_end_at_a_stop_token_or_at_the_limit(single):
    found = sample_all(single, 7)
    ends = set()
    for ids, logps in found.values():
        assert len(ids) == len(logps)
        stops = [index for index, token in enumerate(ids) if token in FILTERED.stop_ids]
        if stops:
            assert stops == [len(ids) - 1]
            ends.add("stop")
        else:
            assert len(ids) == FILTERED.max_tokens
            ends.add("length")
    assert ends == {"stop", "length"}, "the draw does not show both ends: change the seed"


def test_logps_are_those_of_the_unfiltered_policy_at_temperature_1(single):
    params, run = make_params(), compile_logits()
    for (row, _), (ids, logps) in sample_all(single, 7).items():
        prompt = PROMPTS[row][0]
        tokens = np.zeros((1, 24), np.int32)
        tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        logits = run(params, tokens, jnp.array([len(prompt) + len(ids)]))[0]
        every = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + len(ids)]))
        np.testing.assert_allclose(logps, every[np.arange(len(ids)), ids], atol=1e-5)


def test_greedy_decoding_follows_the_argmax_of_the_full_forward_pass(single):
    settings = dataclasses.replace(FILTERED, temperature=0.0, stop_ids=())
    params, run = make_params(), compile_logits()
    found = sample_all(single, 7, settings)
    for row, (prompt, _, samples) in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(settings.max_tokens):
            tokens = np.zeros((1, 24), np.int32)
            tokens[0, : len(ids)] = ids
            ids.append(int(np.argmax(run(params, tokens, jnp.array([len(ids)]))[0, len(ids) - 1])))
        for sample in samples:
            assert found[row, sample][0] == ids[len(prompt) :]


def test_cancelled_slots_become_idle_and_draw_nothing(single):
    init, run_prefill, admit, decode_chunk, weights = compile_all(SHORTER, single)
    keys, values = prefill(weights, run_prefill)
    nobody = decode.Admission(
        slot=np.full(2, 2, np.int32),
        source=np.zeros(2, np.int32),
        token=np.zeros(2, np.int32),
        position=np.zeros(2, np.int32),
        key=np.zeros((2, 2), np.uint32),
    )
    both = dataclasses.replace(
        nobody, slot=np.arange(2, dtype=np.int32), token=np.array([10, 12], np.int32)
    )
    slots = admit(init(slots=2, length=17), keys, values, both, np.array([True, True]))
    assert not slots.done.any(), "who enters a cancelled slot is not cancelled"
    slots = admit(slots, keys, values, nobody, np.array([False, True]))
    assert slots.done.tolist() == [False, True]
    slots, output = decode_chunk(weights, slots)
    assert output.count.tolist() == [3, 0] and output.done.tolist() == [False, True]
    slots = admit(slots, keys, values, nobody, np.array([True, False]))
    _, output = decode_chunk(weights, slots)
    assert output.count.tolist() == [0, 0] and output.done.all()


def test_slots_lie_the_same_way_before_and_after_each_step_so_that_nothing_compiles_twice(mesh):
    init, run_prefill, admit, decode_chunk, weights = compile_all(FILTERED, mesh)
    keys, values = prefill(weights, run_prefill)
    slots = init(slots=4, length=17)
    row = np.zeros(4, np.int32)
    nobody = decode.Admission(row + 4, row, row, row, np.zeros((4, 2), np.uint32))
    spread = [x.sharding for x in jax.tree.leaves(slots)]
    slots = admit(slots, keys, values, nobody, np.zeros(4, bool))
    assert [x.sharding for x in jax.tree.leaves(slots)] == spread
    slots, _ = decode_chunk(weights, slots)
    assert [x.sharding for x in jax.tree.leaves(slots)] == spread
