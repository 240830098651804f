"""The reference "sft": the model that training starts from, or that of `model.reference`.

The latter may have another architecture than the policy. It is a whole model even where the policy
is an adapter, whose reference is else its own base: the adapter left out, or as `lora.path` has it.
"""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from halos_jax.config import Config, ConfigError, ModelConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.models.files import hf
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig, abstract_params
from halos_jax.policies.policy import Policy, load_start, read_model
from halos_jax.policies.source import Source, find_model
from halos_jax.policies.teacher import compare_vocabularies
from halos_jax.types import Params

logger = logging.getLogger(__name__)

_FIELD = "model.reference"


def attach_reference(policy: Policy, config: Config) -> Policy:
    """Return a policy with the model of `model.reference` as its reference, if there is one.

    It is run as the policy is, and held as what it takes the place of: in the dtype of the params
    or, beside an adapter, in the compute dtype. Tokens of `model.added_tokens` that it lacks get
    the rows that they would have at the start of its training. No weights are read.

    Raises:
      ConfigError: if it is not there, or its vocabulary is not the policy's.
      ModelError: if it cannot be read, or writes no text.
    """
    given = config.model.reference
    if not given:
        return policy
    path = find_model(_FIELD, given)
    is_adapter = bool(policy.lora.rank or policy.lora.path)
    own = policy.settings
    settings = dataclasses.replace(
        own,
        path=path,
        checkpoint="auto",
        tokenizer="",
        chat_template="",
        chat_template_options={},
        random_init=False,
        params_dtype=own.compute_dtype if is_adapter else own.params_dtype,
    )
    decoder, renderer = _read(settings, config)
    if decoder.num_labels:
        raise ModelError(
            f"{_FIELD}: got {given!r}, a model that scores texts and writes none; allowed: a "
            "causal language model"
        )
    words, other = policy.renderer.tokenizer.get_vocab(), renderer.tokenizer.get_vocab()
    compare_vocabularies(words, other, given, _FIELD, "reference")
    refuse_longer(decoder, {f"train.max_length ({_FIELD})": config.train.max_length})
    logger.info("reference: %s (model.reference)", path)
    found = Policy(Source(given, settings), decoder, renderer, seed=policy.seed)
    return dataclasses.replace(policy, reference=found)


def _read(settings: ModelConfig, config: Config) -> tuple[DecoderConfig, Renderer]:
    """Read architecture and renderer; errors name the reference's field."""
    try:
        return read_model(settings, config.data.control)
    except (ConfigError, ModelError) as error:
        text = str(error)
        for field in ("model.path:", "model.tokenizer:"):
            text = text.removeprefix(f"{field} ")
        text = text.partition(", or set --config.model.tokenizer")[0]
        raise type(error)(f"{_FIELD}: {text}") from error


def load_sft(policy: Policy, mesh: Mesh, frozen: Frozen | None) -> Params:
    """Load the params of the reference "sft"; every call returns the same.

    They are those of the policy's own reference, where it has one, and else those that training
    starts from (`load_start`).
    """
    other = policy.reference
    if other is None:
        return load_start(policy, mesh, frozen)
    params: Params = hf.load_or_init_params(other.settings, other.decoder, mesh, other.seed)
    return params


def count_room(policy: Policy, mesh: Mesh) -> int:
    """Return how many bytes of a device the pass of the reference needs more than without one.

    It is made before the steps, and its params are freed. Without `model.reference` they are as
    large as the policy's or, with an adapter, there already; so that much is there.
    """
    if policy.reference is None:
        return 0
    is_adapter = bool(policy.lora.rank or policy.lora.path)
    there = 0 if is_adapter else _count_bytes(policy.decoder, mesh)
    return max(_count_bytes(policy.reference.decoder, mesh) - there, 0)


def _count_bytes(decoder: DecoderConfig, mesh: Mesh) -> int:
    leaves = jax.tree.leaves(abstract_params(decoder, mesh))
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = [jnp.dtype(leaf.dtype).itemsize for leaf in leaves]
    return sum(math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True))
