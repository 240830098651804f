"""Digests of weights: of their bits and places, on any mesh, of the policy and of the sampler's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax import sharding
from halos_jax.config import LoraConfig, MeshConfig
from halos_jax.models import cache, lora
from halos_jax.models.hf.families import get_family
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig, init_params, make_spec, params_shardings
from halos_jax.policies import digest

TINY = DecoderConfig(
    97, 3, 32, 4, 2, 8, 48, init_std=0.2, qkv_bias=True, compute_dtype=jnp.bfloat16
)


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), TINY)


def change(params, name, change_one):
    return {**params, "layers": {**params["layers"], name: change_one(params["layers"][name])}}


def test_a_fingerprint_tells_bits_places_names_and_dtypes_apart(params):
    found = digest.fingerprint(params)
    assert len(found) == 32 and int(found, 16)
    assert digest.fingerprint(jax.tree.map(jnp.copy, params)) == found
    gate, up = (params["layers"][name] for name in ("gate", "up"))
    others = [
        change(params, "q", lambda x: x.at[1, 2, 3].set(jnp.nextafter(x[1, 2, 3], 9.0))),
        change(params, "q", lambda x: x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])),
        change(params, "q", lambda x: x[::-1]),
        change(params, "q", lambda x: x.reshape(x.shape[0], -1)),
        change(params, "q", lambda x: x.view(jnp.int32)),
        change(change(params, "gate", lambda _: up), "up", lambda _: gate),
    ]
    assert len({found, *map(digest.fingerprint, others)}) == 1 + len(others)


def test_host_and_device_agree_on_every_mesh(params, monkeypatch):
    leaves = {
        "float": params["embed"],
        "half": params["embed"].astype(jnp.bfloat16),
        "int": jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 8),
        "number": jnp.float32(3.5),
        "empty": jnp.zeros((0, 4)),
        "deep": jnp.ones((1, 2, 1, 2, 1, 2, 3)),
    }
    on_host = digest.fingerprint(leaves)
    monkeypatch.setattr(digest, "_SMALL", -1)
    assert digest.fingerprint(leaves) == on_host
    whole = digest.fingerprint(params)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert digest.fingerprint(jax.device_put(params, params_shardings(TINY, mesh))) == whole
    monkeypatch.undo()
    assert digest.fingerprint(params) == whole


@pytest.mark.parametrize(
    ("mesh", "on_host"),
    [({}, True), ({"data": 2, "fsdp": 2, "tensor": 2}, True), ({"fsdp": 2, "tensor": 2}, False)],
    ids=str,
)
def test_the_samplers_weights_have_the_digests_of_the_policys(params, mesh, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr(digest, "_SMALL", -1)
    tied = dataclasses.replace(TINY, tie_embeddings=True, compute_dtype=jnp.float32)
    for config in (TINY, tied) if on_host else (TINY,):
        made = sharding.make_mesh(MeshConfig(**mesh))
        with jax.set_mesh(made):
            own = dict(params)
            if config is tied:
                del own["head"]
            placed = jax.device_put(own, params_shardings(config, made)) if mesh else own
            weights = jax.jit(lambda one: cache.unstack_layers(one, config))(placed)  # noqa: B023
            assert ("qkv" in weights["layers"][0]) == (not mesh)
            expected = digest.fold_params(placed, config)
            found = digest.fold_weights(weights, config)
        assert expected.keys() == found.keys() >= {"embed", "layers.q", "layers.q_bias"}
        assert digest.find_other(expected, found) == []
    assert expected["layers.k"].shape == (2, 3)


def test_other_weights_are_named_by_layer(params):
    expected = digest.fold_params(params, TINY)
    moved = change(params, "down", lambda x: x.at[1].multiply(1.01))
    moved = change(moved, "k", lambda x: x.at[1:].add(0.01)) | {"embed": -params["embed"]}
    weights = cache.unstack_layers(moved, TINY)
    found = digest.find_other(expected, digest.fold_weights(weights, TINY))
    assert found == ["embed", "layers.down (layers 1)", "layers.k (layers 1, 2)"]
    # What the sampler rounds away does not tell them apart, but the fingerprint does.
    finer = change(params, "down", lambda x: x + 1e-7 * x)
    assert digest.find_other(expected, digest.fold_params(finer, TINY)) == []
    assert digest.fingerprint(finer) != digest.fingerprint(params)


def test_numbers_below_the_normal_ones_count_as_zero():
    small = jnp.array([1e-40, -0.0, 1.5], jnp.float32)
    assert digest.fingerprint({"a": small}) == digest.fingerprint({"a": jnp.array([0.0, 0.0, 1.5])})


def test_an_adapter_has_a_fingerprint_of_its_own_beside_its_base(params):
    family = get_family({"model_type": "llama"})
    adapter = lora.make_adapter(LoraConfig(rank=4), TINY, family, seed=0)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    frozen = Frozen(base, adapter)
    trained = {"layers": {"q_lora_a": np.ones((3, 32, 4), np.float32)}}
    first, second = digest.fingerprint(trained, frozen).split("+")
    assert first == digest.fingerprint(trained) and second == digest.fingerprint(base)


def test_all_processes_add_up_in_one_order(params):
    # The order of a set of names differs between processes, which then exchange wrong sums.
    folded = list(digest.fold_params(params, TINY))
    stacked = [f"layers.{name}" for name in params["layers"]]
    assert folded == [*stacked, *(name for name in make_spec(TINY) if name != "layers")]


def test_a_policy_is_identified_by_one_program_that_gets_each_array_once(params, monkeypatch):
    passed = []

    def note(program, tree, *settings):
        passed.append([id(leaf) for leaf in jax.tree.leaves(tree)])
        return run(program, tree, *settings)

    run = digest._run
    monkeypatch.setattr(digest, "_run", note)
    name, folded = digest.identify(params, None, params, TINY)
    assert [sorted(one) for one in passed] == [sorted(map(id, jax.tree.leaves(params)))]
    assert name == digest.fingerprint(params)
    assert digest.find_other(digest.fold_params(params, TINY), folded) == []
    # Nothing is read of the sampler's weights but what is compared.
    passed.clear()
    weights = cache.unstack_layers(params, TINY)
    assert digest.fold_weights(weights, TINY, ["embed"]).keys() == {"embed"}
    assert passed == [[id(weights["embed"])]]
    # Layers share a program.
    monkeypatch.setattr(digest, "_SMALL", -1)
    digest._compile.cache_clear()
    assert digest.fold_weights(weights, TINY).keys() == folded.keys()
    assert digest._compile.cache_info().misses == 2


def test_the_fingerprint_stays_what_it_is():
    leaf = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    known = digest.fingerprint({"layers": {"q": leaf}, "embed": leaf[0]})
    assert known == "1da674c260e9dcf3c5a1f2be23273b85"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_has_one_fingerprint_on_every_mesh(params, kind, monkeypatch):
    pytest.importorskip("qwix")
    family = get_family({"model_type": "llama"})
    adapter = lora.make_adapter(LoraConfig(rank=4), TINY, family, seed=0)
    trained = {"layers": {"q_lora_a": np.ones((3, 32, 4), np.float32)}}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, params_shardings(TINY, mesh))
    one, many = (
        Frozen(lora.quantize_base({**x, "layers": dict(x["layers"])}, kind), adapter)
        for x in (params, placed)
    )
    known = digest.fingerprint(trained, one)
    assert digest.fingerprint(trained, many) == known
    monkeypatch.setattr(digest, "_SMALL", -1)
    assert digest.fingerprint(trained, many) == known
    # What a scale is still to be applied to is not compared with the sampler's.
    folded = digest.identify(trained, many, many.base, TINY)[1]
    assert folded.keys() >= {"embed", "head", "layers.q_bias"} and "layers.q" not in folded
