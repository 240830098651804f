"""The teacher that `model.teacher` names: found, compared with the policy's vocabulary, loaded."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from halos_jax.config import Config, ConfigError, ModelConfig
from halos_jax.data.chat.loading import load_tokenizer
from halos_jax.losses import Loss
from halos_jax.models.files import hf, vocab
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.spec import DecoderConfig, abstract_params
from halos_jax.policies.policy import Policy
from halos_jax.policies.source import find_model
from halos_jax.training.teacher import Teacher
from halos_jax.types import Params

logger = logging.getLogger(__name__)

_FIELD = "model.teacher"
_SHOWN = 3  # tokens that an error lists of each kind


def load_teacher(config: Config, loss: Loss, policy: Policy, mesh: Mesh) -> Teacher | None:
    """Load the teacher of a loss that compares the policy with one; None for any other loss.

    Its params are held in the compute dtype, as all that is only read in forward passes, sharded
    as the policy's. Embedding and head get as many rows as the policy's: rows that are missing
    belong to no token of the policy, and rows beyond are left out.

    Raises:
      ConfigError: if there is no teacher, or its vocabulary is not the policy's.
      ModelError: if it cannot be read, or writes no text.
    """
    if loss.divergence is None:
        return None
    path, decoder, words = describe_teacher(config, policy)
    params: Params = hf.load_params(path, decoder, mesh)
    fitted = dataclasses.replace(decoder, vocab_size=policy.decoder.vocab_size)
    logger.info("teacher: %s, compared with the policy on %d tokens", path, words)
    return Teacher(_fit_rows(params, fitted, mesh), fitted, words)


def describe_teacher(config: Config, policy: Policy) -> tuple[str, DecoderConfig, int]:
    """Return the teacher's folder or id, its architecture, and how many words the two share.

    Raises:
      ConfigError, ModelError: as `load_teacher`; no weights are read.
    """
    if not config.model.teacher:
        raise ConfigError(
            f"{_FIELD}: got '', allowed: the model that loss {config.loss['name']!r} compares the "
            f"policy with; set --config.{_FIELD}=DIR"
        )
    path = find_model(_FIELD, config.model.teacher)
    settings = _read_settings(config.model, path)
    decoder = hf.load_decoder_config(path, settings)
    if decoder.num_labels:
        raise ModelError(
            f"{_FIELD}: got {config.model.teacher!r}, a model that scores texts and writes none; "
            "allowed: a causal language model"
        )
    own = policy.renderer.tokenizer.get_vocab()
    compare_vocabularies(own, _read_vocabulary(path), config.model.teacher)
    words = max(own.values()) + 1
    if words > decoder.vocab_size:
        raise ModelError(
            f"{_FIELD}: got {config.model.teacher!r}, whose embedding has {decoder.vocab_size} "
            f"rows for the {words} tokens of its tokenizer; allowed: a row for every token"
        )
    refuse_longer(decoder, {f"train.max_length ({_FIELD})": config.train.max_length})
    return path, decoder, words


def _read_settings(model: ModelConfig, path: str) -> ModelConfig:
    """Return how the teacher is run: as the policy is, without what belongs to that alone."""
    return dataclasses.replace(
        model,
        path=path,
        checkpoint="auto",
        random_init=False,
        added_tokens=(),
        params_dtype=model.compute_dtype,
        remat="none",
    )


def _read_vocabulary(path: str) -> Mapping[str, int]:
    """Return the vocabulary of the teacher's tokenizer, token -> id; errors name its field."""
    try:
        return load_tokenizer(path).get_vocab()
    except ConfigError as error:
        text = str(error).replace("model.tokenizer:", f"{_FIELD}:")
        raise ConfigError(text.partition(", or set --config.model.tokenizer")[0]) from error


def compare_vocabularies(
    own: Mapping[str, int],
    other: Mapping[str, int],
    path: str,
    field: str = _FIELD,
    noun: str = "teacher",
) -> None:
    """Refuse a model that does not know each of the policy's tokens by its id.

    Tokens behind all of the policy's are no fault: the policy cannot sample them. A teacher is
    compared with it on what it can; a reference gives the others the probability that it gives.

    Args:
      path: the model's, which `field` holds.
      noun: what it is to the policy.
    """
    words = max(own.values()) + 1
    lacking = sorted(own.keys() - other.keys(), key=own.__getitem__)
    further = [token for token in other.keys() - own.keys() if other[token] < words]
    moved = sorted(own.keys() & other.keys(), key=own.__getitem__)
    moved = [token for token in moved if own[token] != other[token]]
    found = {
        "lacks": [repr(token) for token in lacking],
        "has besides": [repr(token) for token in sorted(further, key=other.__getitem__)],
        "has under other ids": [f"{token!r} ({other[token]}, not {own[token]})" for token in moved],
    }
    if any(found.values()):
        differences = "; ".join(
            f"it {verb} {_list_some(tokens)}" for verb, tokens in found.items() if tokens
        )
        raise ConfigError(
            f"{field}: got {path!r}, whose tokenizer is not the policy's: {differences}; allowed: "
            f"a model with the same tokens under the same ids; take a {noun} of the policy's "
            "family, and leave out model.added_tokens that it does not know"
        )
    beyond = sum(number >= words for number in other.values())
    if beyond and field == _FIELD:
        logger.info(
            "teacher: %d of its tokens stand behind the %d of the policy: they are left out, and "
            "its distribution is over the others",
            beyond,
            words,
        )


def _list_some(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return ", ".join(tokens[:_SHOWN]) + more


def _fit_rows(params: Params, fitted: DecoderConfig, mesh: Mesh) -> Params:
    """Return the params with the rows of embedding and head that `fitted` has; new ones are 0."""
    wanted, size = abstract_params(fitted, mesh), fitted.vocab_size

    def fit(table: jax.Array) -> jax.Array:
        return jnp.pad(table[:size], [(0, max(size - table.shape[0], 0)), (0, 0)])

    made = dict(params)
    for name in vocab.PATHS:
        if name in made and made[name].shape[0] != size:
            with jax.set_mesh(mesh):
                run = jax.jit(fit, out_shardings=wanted[name].sharding)
                made[name] = run(made.pop(name))
    return made
