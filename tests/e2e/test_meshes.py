"""Loss, gradient and samples are those of one device on every kind of mesh, at every size.

XLA's partitioner chooses how to multiply by the sizes: what is right at one number of tokens may be
wrong at another. So each layer is tried where its tokens are about as many as its matrices are
wide, where the cheaper way changes. The models are as narrow as eight devices allow.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import LoraConfig, SamplingConfig
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.toy import make_tokenizer
from halos_jax.losses import get_loss, list_losses
from halos_jax.models import lora
from halos_jax.models.hf.family_table import FAMILIES
from halos_jax.models.spec import (
    ClampedGate,
    DecoderConfig,
    ExpertsConfig,
    GatingConfig,
    init_params,
    params_shardings,
)
from halos_jax.models.value import abstract_value_params, init_value_params
from halos_jax.packing.batches import build_batch, plan_batches
from halos_jax.packing.token_values import Collected
from halos_jax.sampling.sampler import make_sampler, sample_shard
from halos_jax.training import step as steps
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item, Prompt, Turn

WIDTH, ROWS = 128, 8  # of every matrix; of a batch
VOCAB = 64
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8)}
MESHES |= {"2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
ONE = (1, 1, 1)
COUNTS = [WIDTH // 2, WIDTH, 3 * WIDTH // 2, 2 * WIDTH, 4 * WIDTH]  # tokens of a batch
SQUARE = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=WIDTH,
    num_heads=8,
    num_kv_heads=8,
    head_dim=WIDTH // 8,
    d_mlp=WIDTH,
    init_std=0.1,
    head_chunk=7,
)
ROLES = {
    "pair": (CHOSEN, REJECTED),
    "target": (TARGET,),
    "controlled": (TARGET,),
    "unpaired": (TARGET, MISMATCHED),
    "group": (MEMBER,) * 3,
    "answer": (MEMBER,) * 2,
}
LOSSES = {name: get_loss({"name": name}) for name in list_losses()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the losses that it is trained with."""

    losses: tuple[str, ...] = ("dpo",)
    changes: tuple = ()  # of the decoder
    family: str = ""  # of the adapter; "": all params are trained
    base: str = "compute"
    microbatches: int = 1
    tolerance: float = 2e-5  # of a gradient, by the largest one


def of(*losses: str, **changes) -> Case:
    """Return the case of these losses with a changed decoder, or changed fields of its own."""
    own = {field.name for field in dataclasses.fields(Case)} & changes.keys()
    rest = tuple((name, value) for name, value in changes.items() if name not in own)
    return Case(losses or ("dpo",), rest, **{name: changes[name] for name in own})


EXPERTS = ExpertsConfig(num_experts=8, per_token=2, d_mlp=WIDTH)
GATING = GatingConfig(3, num_hidden=2, hidden_dim=WIDTH, temperature=1.0, prompt_end=(1,))
NEOX = {"norm": "layer", "gated_mlp": False, "mlp_bias": True, "qkv_bias": True, "out_bias": True}
NEOX |= {"parallel_residual": True, "tie_embeddings": True, "activation": "gelu"}
GEMMA = {"norm": "rms_offset", "post_norm": True, "windows": (5, 0), "attention_softcap": 20.0}
GEMMA |= {"logit_softcap": 10.0, "tie_embeddings": True, "scale_embeddings": True}
GPT_OSS = {"sinks": True, "clamped_gate": ClampedGate(1.7, 7.0), "windows": (5, 0)}
GPT_OSS |= {"qkv_bias": True, "out_bias": True}
QUANTIZED = {"family": "llama", "base": "int8"}
# What each kind of loss is tried on.
MODELS = {
    "plain": {},
    "adapter": {"family": "llama"},
    "adapter on int8": QUANTIZED,
    "adapter on nf4": QUANTIZED | {"base": "nf4"},
    "experts": {"experts": EXPERTS},
    "sinks": GPT_OSS,
    "sinks, experts with biases": GPT_OSS | {"experts": dataclasses.replace(EXPERTS, bias=True)},
    "layers without rotary embedding": {"unrotated": (True, False), "tie_embeddings": True},
}
KINDS = {
    "pairs": of("dpo"),
    "value head": of("ppo"),
    "scores": of("bradley-terry", num_labels=1),
}
CASES = {
    f"{kind}, {model}": of(*case.losses, **dict(case.changes), **changes)
    for kind, case in KINDS.items()
    for model, changes in MODELS.items()
} | {
    "every loss of log-probabilities": of(
        *(name for name, loss in LOSSES.items() if loss.needs == "logps" and not loss.value)
    ),
    "every loss of scores": of(
        *(name for name, loss in LOSSES.items() if loss.needs == "scores"), num_labels=1
    ),
    "value head, microbatches": of("ppo", microbatches=2),
    "value head, remat": of("ppo", remat="full"),
    "gated scores": of("bradley-terry", num_labels=1, gating=GATING),
    "layer norm, biases, no gate, parallel": of(**NEOX),
    "norms behind, windows, soft caps": of(**GEMMA),
    "few key heads, a wide MLP": of(num_kv_heads=4, d_mlp=2 * WIDTH, qk_norm="all"),
    "remat, unrolled": of(remat="attention", unroll_layers=True),
    "microbatches": of(microbatches=2),
    "bfloat16": of("dpo", compute_dtype="bfloat16", tolerance=5e-2),
    "adapter of fused weights": of(family="phi3"),
    "adapter, no gate": of(family="gpt_neox", **NEOX),
    "experts that do not divide": of(
        experts=ExpertsConfig(num_experts=3, per_token=2, d_mlp=WIDTH, normalize=False)
    ),
    "experts with biases that do not divide": of(
        experts=dataclasses.replace(EXPERTS, num_experts=3, bias=True), **GPT_OSS
    ),
    "adapter on experts in int8": of(family="mixtral", experts=EXPERTS, base="int8"),
    "adapter on experts with biases in nf4": of(
        family="gpt_oss", base="nf4", experts=dataclasses.replace(EXPERTS, bias=True), **GPT_OSS
    ),
}


def make_mesh(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, sharding.MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def config_of(case: Case) -> DecoderConfig:
    return dataclasses.replace(SQUARE, **dict(case.changes))


@functools.cache
def make_batches(count: int, microbatches: int):
    """Return for each kind of items a batch of 8 rows of `count / 8` tokens, an item a row."""
    rng, length = np.random.default_rng(count), count // ROWS
    draw = lambda size: rng.integers(1, VOCAB, size).astype(np.int32)  # noqa: E731
    items, size = [], ROWS * microbatches
    for roles in ROLES.values():
        response = (length - 1) // len(roles)
        for number in range(size):
            responses = tuple(draw(response) for _ in roles)
            scores = tuple(map(float, rng.normal(size=len(roles))))
            prompt = draw(length - response * len(roles))
            items.append(Item(prompt, responses, roles, scores, desirable=number % 3 > 0))
    logps = [
        tuple(rng.normal(-4, 0.7, len(r)).astype(np.float32) for r in item.responses)
        for item in items
    ]
    plan = plan_batches(
        items, batch_size=size, num_rows=ROWS, tokens_per_row=length, row_multiple=8
    )
    assert (plan.layout.tokens, plan.layout.microbatches) == (length, microbatches)
    return {
        kind: build_batch(
            items, plan, step, reference_logps=logps, old=Collected(logps, logps, seed=step)
        )
        for step, kind in enumerate(ROLES)
    }


@functools.cache
def draw_params(case: Case):
    """Return (what is trained, base or None, its adapter or None) on the host."""
    config = config_of(case)
    rng = np.random.default_rng(0)
    # Scales and biases, which begin as ones and zeros, among them.
    base = jax.tree.map(
        lambda leaf: (leaf + 0.05 * rng.normal(size=leaf.shape)).astype(np.float32),
        jax.device_get(init_params(jax.random.key(0), config)),
    )
    adapter, trained = None, base
    if case.family:
        settings = LoraConfig(rank=8, dropout=0.1)
        adapter = lora.make_adapter(settings, config, FAMILIES[case.family], seed=5)
        trained = jax.tree.map(
            lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32),
            lora.make_spec(adapter, config),
            is_leaf=lambda leaf: hasattr(leaf, "axes"),
        )
    if LOSSES[case.losses[0]].value:
        value = init_value_params(jax.random.key(1), WIDTH)
        value["third"] = 0.01 * jax.random.normal(jax.random.key(2), value["third"].shape)
        # Every unit far from its ReLU's kink, where rounding would decide of a gradient.
        signs = 1.0 - 2.0 * (np.arange(WIDTH) % 2)
        value |= {"first_bias": 6.0 * signs, "second_bias": 25.0 * signs}
        trained = {**trained, "value": jax.tree.map(np.float32, value)}
    return trained, base if case.family else None, adapter


def place_params(case: Case, mesh):
    """Return what is trained and what is frozen as they lie on `mesh`."""
    config, (trained, base, adapter) = config_of(case), draw_params(case)
    placed = jax.tree.map(lambda leaf: leaf.sharding, lora.abstract_trained(config, mesh, adapter))
    if "value" in trained:
        head = abstract_value_params(WIDTH, mesh)
        placed["value"] = {name: leaf.sharding for name, leaf in head.items()}
    trained = jax.device_put(trained, placed)
    if adapter is None:
        return trained, None
    base = jax.device_put(base, params_shardings(config, mesh))
    base = lora.quantize_base(base, case.base) if case.base != "compute" else base
    return trained, lora.Frozen(base, adapter)


@functools.cache
def run_steps(case: Case, sizes: tuple[int, ...], count: int, choose):
    """Return of each loss its value, and its gradient in one tree of host arrays."""
    config, losses = config_of(case), [LOSSES[name] for name in case.losses]
    mesh, batches = make_mesh(sizes), make_batches(count, case.microbatches)

    def run(index, trained, frozen, batch):
        loss = choose(losses, index) if len(losses) > 1 else losses[0]
        frozen = lora.start_dropout(frozen, jnp.int32(3))
        value, gradient, _ = steps.loss_and_gradient(trained, frozen, batch, loss, config)
        return value, gradient

    with jax.set_mesh(mesh):
        trained, frozen = place_params(case, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        step = jax.jit(run, out_shardings=(sharding.replicated(mesh), shardings))
        found = []
        for index, loss in enumerate(losses):
            batch = sharding.put_batch(batches[loss.items], mesh, leading=1)
            if not loss.value:
                batch = batch.replace(noise=None, old_values=None)
            found.append(jax.device_get(step(index, trained, frozen, batch)))
    return found


def measure_errors(case: Case, sizes: tuple[int, ...], count: int, choose):
    """Return of each loss the errors of value and gradient, of the latter by the largest one."""
    errors = {}
    found = run_steps(case, sizes, count, choose)
    for name, one, many in zip(
        case.losses, run_steps(case, ONE, count, choose), found, strict=True
    ):
        (value, gradient), (other, others) = one, many
        worst = 0.0
        # The gradients of policy and value head each by its own size.
        for is_head in {False, "value" in gradient}:
            pairs = [
                leaves
                for part in gradient
                if (part == "value") == is_head
                for leaves in zip(
                    jax.tree.leaves(gradient[part]), jax.tree.leaves(others[part]), strict=True
                )
            ]
            scale = max(np.abs(leaf).max() for leaf, _ in pairs)
            assert scale > 1e-4, name
            worst = max(worst, *(np.abs(x - y).max() / scale for x, y in pairs))
        # A loss may be the difference of large parts: then by the size of these.
        errors[name] = abs(other - value) / max(abs(value), 0.1), worst
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_one_device(name, mesh, count, choose):
    case = CASES[name]
    for loss, errors in measure_errors(case, MESHES[mesh], count, choose).items():
        assert max(errors) < case.tolerance, (loss, errors)


SAMPLED = [
    *(f"pairs, {model}" for model in MODELS if model != "sinks"),
    "experts that do not divide",
    "experts with biases that do not divide",
    "layer norm, biases, no gate, parallel",
    "norms behind, windows, soft caps",
    "few key heads, a wide MLP",
    "adapter on experts in int8",
    "adapter on experts with biases in nf4",
]
# In every run of the tests; a dense model is in tests/sampling/test_sampler.py.
QUICK = ("adapter on experts with biases in nf4",)
# So high that every model here is unsure: no two answers should be alike by its own choice.
TEMPERATURE = 4.0


@functools.cache
def draw_samples(case: Case, sizes: tuple[int, ...], count: int):
    """Return samples of a shard whose decode steps have `count` tokens, one a slot."""
    config, mesh = config_of(case), make_mesh(sizes)
    letters = [chr(number) for number in range(ord("!"), ord("z"))]
    renderer = next(
        one
        for end in range(1, len(letters))
        if len((one := make_renderer(make_tokenizer("".join(letters[:end])))).tokenizer) == VOCAB
    )
    settings = SamplingConfig(
        num_samples_per_prompt=8,
        temperature=TEMPERATURE,
        top_p=0.9,
        max_tokens=4,
        max_prompt_length=16,
        slots=count,
        chunk=4,
        keep_logps=True,
    )
    rng = np.random.default_rng(count)
    prompts = [
        Prompt(f"p{number}", (Turn("user", "".join(rng.choice(letters[:9], 1 + number % 7))),))
        for number in range(count // 8)
    ]
    with jax.set_mesh(mesh):
        merged = lora.merge_adapter(*place_params(case, mesh))
        sampler = make_sampler(settings, renderer, config, mesh)
        return sample_shard(sampler, sampler.unstack(merged), prompts, seed=0, round=1)


def list_samplings():
    """Yield (case, mesh, count) of all samplings, the slow ones marked."""
    for name, mesh, count in itertools.product(SAMPLED, MESHES, COUNTS):
        is_quick = name in QUICK and (mesh, count) == ("2x2x2", WIDTH)
        yield pytest.param(name, mesh, count, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mesh", "count"), list_samplings())
def test_samples_are_those_of_one_device(name, mesh, count):
    expected = draw_samples(CASES[name], ONE, count)
    found = draw_samples(CASES[name], MESHES[mesh], count)
    assert len(found) == count and len({one.response_ids for one in found}) > 0.9 * count
    for one, other in zip(expected, found, strict=True):
        assert one.response_ids == other.response_ids
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)
