"""Attention against a dense masked reference in float64, for every way into it."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.models.attention import backends as attention
from halos_jax.models.attention.dense import PLAIN, Scoring
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.types import CHOSEN, MEMBER, REJECTED, Item

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


WINDOWED = Scoring(window=5)
CAPPED = Scoring(scale=0.5, softcap=1.5)
BOTH = Scoring(scale=0.5, softcap=1.5, window=5)
SINKS = np.array([-1.0, 0.5, 2.0, 4.0], np.float32)


def attend_dense(q, k, v, visible, scoring=PLAIN):
    """Attend `[T, N, H]` to `[T, K, H]` where `visible bool[T, T]`, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores = np.einsum("tnh,snh->nts", q, k) * (scoring.scale or q.shape[-1] ** -0.5)
    if scoring.softcap:
        scores = scoring.softcap * np.tanh(scores / scoring.softcap)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores)
    sinks = 0 if scoring.sinks is None else np.exp(np.float64(scoring.sinks))[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True) + sinks
    return np.einsum("nts,snh->tnh", weights, v)


def draw_qkv(rows, length, *, head_dim=HEAD_DIM, kv_heads=KV_HEADS, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (HEADS, kv_heads, kv_heads)
    return [
        jax.random.normal(key, (rows, length, count, head_dim))
        for key, count in zip(keys, heads, strict=True)
    ]


def pack(roles, num_rows=2, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: np.ones(rng.integers(1, 12), np.int32)  # noqa: E731
    items = [Item(draw(), tuple(draw() for _ in roles), roles) for _ in range(6)]
    plan = plan_batches(items, batch_size=6, num_rows=num_rows, tokens_per_row=512, row_multiple=8)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), build_batch(items, plan, 0))
    return items, plan, batch


def visible_tokens(members, length):
    """Return bool[T, T]: a response sees its prompt and itself, causally; a prompt itself."""
    visible = np.eye(length, dtype=bool)
    start = 0
    for item in members:
        end = prompt_end = start + len(item.prompt_ids)
        visible[start:end, start:end] = np.tri(end - start, dtype=bool)
        for response in item.responses:
            own = slice(end, end + len(response))
            visible[own, start:prompt_end] = True
            visible[own, own] = np.tri(len(response), dtype=bool)
            end += len(response)
        start = end
    return visible


def band(length, window):
    """Return bool[T, T]: each position sees itself and the `window - 1` before it."""
    return np.tri(length, dtype=bool) & ~np.tri(length, k=-window, dtype=bool)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("scoring", [WINDOWED, CAPPED, BOTH, Scoring(window=20), Scoring(window=1)])
def test_windows_soft_caps_and_scales_equal_dense_attention(scoring, sinks):
    scoring = scoring.replace(sinks=sinks)
    q, k, v = draw_qkv(3, 20)
    lengths = jnp.array([20, 13, 7])
    run = jax.jit(functools.partial(attention.attend_rows, backend="xla", scoring=scoring))
    rows = run(q, k, v, lengths)
    visible = band(20, scoring.window or 20)
    # The cache may be longer than what is filled; what stands there must not matter.
    keys, values = (jnp.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=9) for x in (k, v))
    decode = jax.jit(functools.partial(attention.attend_cache, backend="xla", scoring=scoring))
    cached = decode(q[jnp.arange(3), lengths - 1], keys, values, lengths - 1)
    for row, length in enumerate(lengths):
        expected = attend_dense(q[row], k[row], v[row], visible, scoring)
        np.testing.assert_allclose(rows[row, :length], expected[:length], atol=2e-6)
        np.testing.assert_allclose(cached[row], expected[length - 1], atol=2e-6)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_windows_count_positions_of_the_sequence_not_of_the_row(sinks):
    items, plan, batch = pack((CHOSEN, REJECTED))
    q, k, v = draw_qkv(*batch.tokens.shape)
    scoring = BOTH.replace(sinks=sinks)
    run = jax.jit(functools.partial(attention.attend_view, backend="xla", scoring=scoring))
    got = run(q, k, v, batch.view)
    for row, members in enumerate(plan.steps[0]):
        members = [items[index] for index in members]
        real = sum(item.num_tokens for item in members)
        visible = visible_tokens(members, batch.tokens.shape[1])
        place = np.asarray(batch.positions[row])
        visible &= place[:, None] - place < scoring.window
        expected = attend_dense(q[row], k[row], v[row], visible, scoring)
        np.testing.assert_allclose(got[row, :real], expected[:real], atol=2e-6)


@pytest.mark.parametrize("roles", [(CHOSEN, REJECTED), (MEMBER,) * 4])
def test_attend_view_equals_dense_attention_with_shared_prompts(roles):
    items, plan, batch = pack(roles)
    q, k, v = draw_qkv(*batch.tokens.shape)
    got = jax.jit(functools.partial(attention.attend_view, backend="xla"))(q, k, v, batch.view)
    for row, members in enumerate(plan.steps[0]):
        members = [items[index] for index in members]
        real = sum(item.num_tokens for item in members)
        visible = visible_tokens(members, batch.tokens.shape[1])
        expected = attend_dense(q[row], k[row], v[row], visible)
        np.testing.assert_allclose(got[row, :real], expected[:real], atol=2e-6)
        assert not np.asarray(got[row, real:]).any()


# A single kv head cannot be shared by the tensor axis: all heads are replicated.
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attend_view_on_the_mesh_equals_one_device(mesh, mesh1, kv_heads):
    _, _, batch = pack((CHOSEN, REJECTED), num_rows=4)
    q, k, v = draw_qkv(*batch.tokens.shape, kv_heads=kv_heads)

    def run(mesh):
        # A function of its own: what is traced depends on the mesh in force.
        def total(sinks, *args):
            scoring = Scoring(sinks=sinks)
            out = attention.attend_view(*args, backend="xla", scoring=scoring)
            return (out**2).sum(), out

        with jax.set_mesh(mesh):
            placed = sharding.put_batch((q, k, v, batch.view), mesh)
            by_head = jax.device_put(SINKS, sharding.named_sharding(("heads",), (HEADS,), mesh))
            attend = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
            return jax.tree.map(np.asarray, attend(by_head, *placed))

    (value, out), gradients = run(mesh)
    (expected_value, expected), expected_gradients = run(mesh1)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert np.abs(other).max() > 1e-2
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_through_the_view_equal_those_of_dense_attention():
    items, plan, batch = pack((CHOSEN, REJECTED), num_rows=1)
    qkv = draw_qkv(*batch.tokens.shape)
    visible = visible_tokens([items[i] for i in plan.steps[0][0]], batch.tokens.shape[1])
    real = sum(item.num_tokens for item in items)

    def ours(qkv):
        out = attention.attend_view(*qkv, batch.view, backend="xla")
        return (out[0, :real] ** 2).sum()

    def dense(qkv):
        q, k, v = (x[0] for x in qkv)
        k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
        scores = jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(HEAD_DIM)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return (jnp.einsum("nts,snh->tnh", weights, v)[:real] ** 2).sum()

    got, expected = jax.jit(jax.grad(ours))(qkv), jax.jit(jax.grad(dense))(qkv)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_attend_rows_is_causal_up_to_each_length(mesh):
    q, k, v = draw_qkv(4, 20)
    lengths = jnp.array([20, 13, 1, 0])
    run = jax.jit(functools.partial(attention.attend_rows, backend="xla"))
    got = np.asarray(run(q, k, v, lengths))
    assert np.isfinite(got).all()
    for row, length in enumerate(lengths):
        expected = attend_dense(q[row], k[row], v[row], np.tri(20, dtype=bool))
        np.testing.assert_allclose(got[row, :length], expected[:length], atol=2e-6)


def test_attend_cache_equals_the_last_query_of_causal_attention():
    q, k, v = draw_qkv(4, 20)
    positions = jnp.array([0, 5, 13, 19])
    last = q[jnp.arange(4), positions]
    # What a slot held before stands behind the position, and must not be seen.
    behind = jnp.arange(20) > positions[:, None]
    keys, values = (jnp.where(behind[..., None, None], 1e4, x) for x in (k, v))
    run = jax.jit(functools.partial(attention.attend_cache, backend="xla"))
    got = run(last, keys, values, positions)
    for slot, position in enumerate(positions):
        expected = attend_dense(q[slot], k[slot], v[slot], np.tri(20, dtype=bool))[position]
        np.testing.assert_allclose(got[slot], expected, atol=2e-6)


def test_a_sink_far_above_or_below_all_scores_is_finite():
    q, k, v = draw_qkv(1, 6)
    far = jnp.array([300.0, -300.0, 1e30, -1e30])

    def total(sinks):
        out = attention.attend_rows(
            q, k, v, jnp.array([6]), backend="xla", scoring=Scoring(sinks=sinks)
        )
        return (out**2).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(far)
    expected = attend_dense(q[0], k[0], v[0], np.tri(6, dtype=bool))
    expected[:, ::2] = 0  # all goes to the sink, or nothing
    np.testing.assert_allclose(out[0], expected, atol=2e-6)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "scoring",
    [PLAIN, Scoring(0.2, 1.5, 40), Scoring(window=40, sinks=SINKS), Scoring(sinks=SINKS)],
    ids=["plain", "capped", "sinks in a window", "sinks"],
)
def test_splash_equals_xla_in_value_and_gradient(scoring):
    # The kernel runs on TPU; the interpreter runs the same kernel here.
    q, k, v = draw_qkv(2, 70, head_dim=64)
    lengths = jnp.array([70, 33])
    weights = (jnp.arange(70) < lengths[:, None])[..., None, None] * draw_qkv(2, 70, head_dim=64)[0]

    def run(attend):
        def total(qkv, scoring):
            return (attend(*qkv, lengths, scoring=scoring) * weights).sum()

        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))((q, k, v), scoring)
        return value, jax.tree.leaves(gradients)

    value, gradient = run(functools.partial(attention._attend_splash, interpret=True))
    expected_value, expected = run(functools.partial(attention.attend_causal, backend="xla"))
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    for one, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.parametrize(("num_heads", "queries"), [(HEADS, HEADS // KV_HEADS), (KV_HEADS, 2)])
@pytest.mark.parametrize("flag", ["true", "false"])
def test_cudnn_has_several_queries_where_it_must_repeat_itself(
    monkeypatch, num_heads, queries, flag
):
    """Its kernel for a single query adds up in an order that changes."""
    attend, seen = jax.nn.dot_product_attention, []

    def attend_xla(q, k, v, *, implementation, **options):
        seen.append((q.shape[1], implementation))
        return attend(q, k, v, implementation="xla", **options)

    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_deterministic_ops={flag}")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend_xla)
    q, keys, values = draw_qkv(3, 20)
    q, positions = q[:, 0, :num_heads], jnp.array([0, 7, 19])
    run = functools.partial(attention.attend_cache, q, keys, values, positions)
    scoring = Scoring(scale=0.3)
    expected = run(backend="xla", scoring=scoring)
    np.testing.assert_allclose(run(backend="cudnn", scoring=scoring), expected, atol=2e-6)
    assert seen == [(queries if flag == "true" else 1, "cudnn")]


@pytest.fixture
def platform(monkeypatch):
    """Return a function that makes JAX say it runs on another platform."""
    attention.choose_backend.cache_clear()
    yield lambda name: monkeypatch.setattr(jax, "default_backend", lambda: name)
    attention.choose_backend.cache_clear()


@pytest.mark.parametrize(
    ("runs_on", "name", "head_dim", "dtype", "expected"),
    [
        ("cpu", "auto", 64, "float32", "xla"),
        ("gpu", "auto", 64, "bfloat16", "cudnn"),
        ("gpu", "auto", 64, "float32", "xla"),
        ("gpu", "auto", 20, "bfloat16", "xla"),
        ("gpu", "auto", 512, "bfloat16", "xla"),
        ("tpu", "auto", 128, "float32", "splash"),
        ("tpu", "auto", 48, "bfloat16", "xla"),
        ("gpu", "xla", 64, "bfloat16", "xla"),
        ("gpu", "cudnn", 128, "bfloat16", "cudnn"),
        ("tpu", "splash", 64, "bfloat16", "splash"),
    ],
)
def test_backends_are_chosen_without_a_word(
    platform, caplog, runs_on, name, head_dim, dtype, expected
):
    platform(runs_on)
    assert attention.choose_backend(name, head_dim, dtype) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("runs_on", "name", "head_dim", "dtype"),
    [
        ("cpu", "cudnn", 64, "bfloat16"),
        ("cpu", "splash", 64, "bfloat16"),
        ("gpu", "cudnn", 20, "bfloat16"),
        ("gpu", "cudnn", 64, "float32"),
        ("tpu", "splash", 48, "bfloat16"),
    ],
)
def test_a_backend_that_cannot_run_falls_back_and_says_so_once(
    platform, caplog, runs_on, name, head_dim, dtype
):
    platform(runs_on)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert attention.choose_backend(name, head_dim, dtype) == "xla"
    (record,) = caplog.records
    for part in (repr(name), runs_on, str(head_dim), dtype, "'xla'"):
        assert part in record.getMessage()


@pytest.mark.parametrize("name", ["auto", "cudnn"])
def test_a_soft_cap_keeps_cudnn_away_and_says_so(platform, caplog, name):
    platform("gpu")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert attention.choose_backend(name, 64, "bfloat16", 50.0) == "xla"
    (record,) = caplog.records
    assert "soft cap 50" in record.getMessage() and "'cudnn'" in record.getMessage()
    platform("tpu")
    assert attention.choose_backend("auto", 64, "float32", 50.0) == "splash"


def test_sinks_need_room_in_the_head_dimension(platform, caplog):
    platform("gpu")
    assert attention.choose_backend("auto", 248, "bfloat16", sinks=True) == "cudnn"
    assert attention.choose_backend("auto", 256, "bfloat16") == "cudnn"
    assert not caplog.records
    assert attention.choose_backend("cudnn", 256, "bfloat16", sinks=True) == "xla"
    assert "256 in bfloat16 and attention sinks: using 'xla'" in caplog.text
    platform("tpu")
    assert attention.choose_backend("auto", 64, "float32", sinks=True) == "splash"


def attend_plain(q, k, v, lengths, *, scale):
    """Stands for a kernel that has no sinks."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="xla")


@pytest.mark.parametrize("scale", [None, 0.6])
def test_a_key_in_front_is_a_sink_in_value_and_gradient(scale):
    q, k, v = draw_qkv(2, 20)
    lengths, weights = jnp.array([20, 11]), draw_qkv(2, 20, seed=1)[0]
    scoring = Scoring(scale=scale, sinks=jnp.asarray(SINKS))

    def run(attend):
        def total(qkv, scoring):
            out = attend(*qkv, lengths, scoring=scoring)
            return (out * weights).sum(), out

        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, out), gradients = run((q, k, v), scoring)
        return out, jax.tree.leaves(gradients)

    out, gradients = run(functools.partial(attention.attend_sink_key, attend=attend_plain))
    expected, expected_gradients = run(functools.partial(attention.attend_causal, backend="xla"))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert np.abs(other).max() > 1e-2
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_sink_is_not_rounded_in_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw_qkv(1, 4, head_dim=64))
    sinks = np.array([3.01, 100.3, -2.007, 0.0], np.float32)

    def attend(q, k, v, lengths, *, scale):
        assert lengths == 5 and not np.asarray(v[:, 0]).any()
        key = np.asarray(k[0, 0, 0], np.float64)
        assert q.shape[1:] == (8, HEADS, 72) and k.shape[1:] == (8, KV_HEADS, 72)
        scores = scale * np.asarray(q, np.float64)[0, 1:5] @ key
        np.testing.assert_allclose(scores, np.broadcast_to(sinks, (4, HEADS)), rtol=2**-16)
        return q

    kept = attention.attend_sink_key(
        q, k, v, jnp.array([4]), Scoring(sinks=jnp.asarray(sinks)), attend=attend
    )
    np.testing.assert_array_equal(kept, q)
