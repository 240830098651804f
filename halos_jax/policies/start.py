"""What a run starts from: its policy's architecture, renderer and params."""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh

from halos_jax.config import Config, ConfigError, ModelConfig
from halos_jax.data.chat.loading import load_policy_renderer
from halos_jax.data.chat.renderer import Renderer
from halos_jax.models import lora
from halos_jax.models.files import hf, peft, vocab
from halos_jax.models.hf import families
from halos_jax.models.hf.families import Family
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig
from halos_jax.training.loop import Trainer

logger = logging.getLogger(__name__)


def load_policy(
    settings: ModelConfig, control: Collection[str] = ()
) -> tuple[DecoderConfig, Renderer]:
    """Load the policy's decoder config and renderer, with a row for each of its tokens.

    Args:
      control: as of `loading.load_policy_renderer`.

    The params of the former, `hf.load_or_init_params` of it, have the rows of new tokens filled.

    Raises:
      ConfigError: where there is no usable tokenizer.
      ModelError: where there is no usable model, or it and the tokenizer do not fit.
    """
    decoder = hf.load_decoder_config(settings.path, settings)
    if decoder.gating is not None:
        raise hf.ModelError(
            f"model.path: got {settings.path!r}, a reward model with a gating network; allowed: a "
            "language model, or a classifier with a linear head; this one can be reward.path"
        )
    renderer = load_policy_renderer(settings, control)
    vocabulary = renderer.tokenizer.get_vocab()
    return vocab.fit_vocab(decoder, vocabulary, renderer.new_tokens, settings), renderer


def refuse_classifier(decoder: DecoderConfig, path: str) -> None:
    """Raise ConfigError where the model of a policy gives scores and no text."""
    if decoder.num_labels:
        raise ConfigError(
            f"model.path: got {path!r}, a model that scores texts and writes none; allowed: a "
            "causal language model; a reward model goes to --config.reward.path"
        )


def load_frozen(config: Config, decoder: DecoderConfig, mesh: Mesh) -> Frozen | None:
    """Load the base that the adapter of `config.lora` is trained on; None where that is off.

    It is held in the compute dtype, or in fewer bits, as `lora.base` says: a forward pass reads it
    as nothing else, and no update that needs more precision is made to it.

    Raises:
      ModelError: where the targets are not the model's, or `lora.path` is no adapter for it.
    """
    settings = config.lora
    if not (settings.rank or settings.path):
        return None
    family = _find_family(config)
    if settings.path:
        adapter = peft.read_adapter(
            settings.path, decoder, family, dropout=settings.dropout, seed=config.seed
        )
    else:
        adapter = lora.make_adapter(settings, decoder, family, seed=config.seed)
    if decoder.new_rows:
        logger.warning(
            "lora: the rows of the %d new tokens belong to the frozen base and are not trained",
            len(decoder.new_rows),
        )
    held = dataclasses.replace(decoder, params_dtype=decoder.compute_dtype)
    base = _load_model(config, held, mesh)
    if settings.base != "compute":
        base = lora.quantize_base(base, settings.base)
    return Frozen(base, adapter)


def load_start(trainer: Trainer) -> Any:
    """Load the params that training starts from, and that are the reference "sft" of the run.

    That is the model of `config.model`, or with LoRA the adapter at `lora.path`, else a fresh one,
    which adds exactly nothing to the model. Every call gives the same.
    """
    config, decoder, frozen = trainer.config, trainer.decoder, trainer.frozen
    if frozen is None:
        return _load_model(config, decoder, trainer.mesh)
    if not config.lora.path:
        return lora.init_adapter(config.seed, frozen, decoder, trainer.mesh)
    return peft.load_adapter(config.lora.path, frozen, decoder, _find_family(config), trainer.mesh)


def _load_model(config: Config, decoder: DecoderConfig, mesh: Mesh) -> Any:
    allow_new = ("score",) if decoder.num_labels else ()
    return hf.load_or_init_params(config.model, decoder, mesh, config.seed, allow_new=allow_new)


def _find_family(config: Config) -> Family:
    return families.get_family(hf.read_hf_config(hf.resolve_model(config.model.path)))
