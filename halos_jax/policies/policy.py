"""A policy as a value: all about it but its weights, which are loaded when they are needed.

    find_policy      what `config.model` names: a model, a finished run, a checkpoint of a run
    start_policy     what training starts from, with the adapter of `config.lora`
    load_trained     the weights of a policy as it is; `load_params` merges an adapter's
    load_start       the weights that training starts from, which are the reference "sft" of a run
    load_reference   the weights that an evaluation compares a policy with

`final.export_policy` writes one.
"""

import dataclasses
import logging
from collections.abc import Collection

from jax.sharding import Mesh

from halos_jax.checkpoints.store import read_checkpoints
from halos_jax.config import Config, ConfigError, LoraConfig, ModelConfig
from halos_jax.config.execution import Dtype
from halos_jax.config.tasks import TASKS
from halos_jax.data.chat.loading import load_policy_renderer
from halos_jax.data.chat.renderer import Renderer
from halos_jax.models import lora
from halos_jax.models.files import hf, peft, vocab
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.family_table import Family
from halos_jax.models.lora import Frozen
from halos_jax.models.spec import DecoderConfig
from halos_jax.policies import source as sources
from halos_jax.policies.source import Source
from halos_jax.types import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy on paper.

    Attributes:
      source: where it comes from, with its files and how it is computed and rendered.
      decoder: its architecture, with a row for each token of `renderer`.
      renderer: its tokenizer and chat template.
      lora: the adapter that is trained on it; rank 0 and no path: all its params are.
      seed: of weights that no file holds.
      base_dtype: what the frozen base of an adapter is held in; None: what it is computed in.
    """

    source: Source
    decoder: DecoderConfig
    renderer: Renderer
    lora: LoraConfig = LoraConfig()
    seed: int = 0
    base_dtype: Dtype | None = None

    @property
    def settings(self) -> ModelConfig:
        """The model's files, and how it is computed and rendered."""
        return self.source.settings

    def refuse_classifier(self, path: str) -> None:
        """Raise ConfigError, which names `path`, where it gives scores and no text."""
        if self.decoder.num_labels:
            raise ConfigError(
                f"model.path: got {path!r}, a model that scores texts and writes none; allowed: a "
                "causal language model; a reward model goes to --config.reward.path"
            )

    def with_head(self) -> "Policy":
        """Return the policy with a head for scores, new unless it has one."""
        labels = self.decoder.num_labels or 1
        return dataclasses.replace(
            self, decoder=dataclasses.replace(self.decoder, num_labels=labels)
        )


def find_policy(
    settings: ModelConfig, *, control: Collection[str] = (), recorded: str = "", seed: int = 0
) -> Policy:
    """Find the policy that `settings` name, in Hugging Face format or as a run's workdir.

    Args:
      control: further tokens, as of `loading.load_policy_renderer`; those of the run that trained
        the policy are known.
      recorded: as of `source.find_source`.
      seed: of weights that are drawn (`model.random_init`).

    Raises:
      ConfigError, CheckpointError: where there is no such policy.
      ModelError: where it cannot be read.
    """
    return _describe(sources.find_source(settings, recorded=recorded), control, seed)


def start_policy(config: Config) -> Policy:
    """Return the policy that the training of `config` starts from; its model must be a model."""
    decoder, renderer = _read_model(config.model, config.data.control)
    source = Source(config.model.path, config.model)
    return Policy(source, decoder, renderer, config.lora, config.seed)


def load_params(policy: Policy, mesh: Mesh) -> Params:
    """Load the params of a policy for sampling; those of an adapter are merged with its base."""
    return lora.merge_adapter(*load_trained(policy, mesh))


def load_trained(policy: Policy, mesh: Mesh) -> tuple[Params, Frozen | None]:
    """Load what is trained of a policy and, of an adapter's checkpoint, the frozen rest.

    Raises:
      ModelError, CheckpointError: where they cannot be read.
    """
    found, decoder = policy.source, policy.decoder
    if found.workdir is None or found.checkpoint is None:
        return hf.load_or_init_params(policy.settings, decoder, mesh, policy.seed), None
    frozen = load_frozen(policy, mesh)
    trained = lora.abstract_trained(decoder, mesh, frozen.adapter if frozen else None)
    checkpoints = read_checkpoints(found.workdir / "checkpoints")
    try:
        return checkpoints.restore_policy(trained, found.checkpoint), frozen
    finally:
        checkpoints.close()


def load_frozen(policy: Policy, mesh: Mesh) -> Frozen | None:
    """Load the base that the policy's adapter is trained on; None where it has none.

    It is held in the compute dtype, or in fewer bits, as `lora.base` says: a forward pass reads it
    as nothing else, and no update that needs more precision is made to it.

    Raises:
      ModelError: where the targets are not the model's, or `lora.path` is no adapter for it.
    """
    settings, decoder = policy.lora, policy.decoder
    if not (settings.rank or settings.path):
        return None
    family = _find_family(policy)
    if settings.path:
        adapter = peft.read_adapter(
            settings.path, decoder, family, dropout=settings.dropout, seed=policy.seed
        )
    else:
        adapter = lora.make_adapter(settings, decoder, family, seed=policy.seed)
    if decoder.new_rows:
        logger.warning(
            "lora: the rows of the %d new tokens belong to the frozen base and are not trained",
            len(decoder.new_rows),
        )
    if policy.base_dtype:
        decoder = dataclasses.replace(decoder, compute_dtype=policy.base_dtype)
    held = dataclasses.replace(decoder, params_dtype=decoder.compute_dtype)
    base = _load_model(policy, held, mesh)
    if settings.base != "compute":
        base = lora.quantize_base(base, settings.base)
    return Frozen(base, adapter)


def load_start(policy: Policy, mesh: Mesh, frozen: Frozen | None) -> Params:
    """Load the params that training starts from, and that are the reference "sft" of the run.

    That is the policy's model, or with LoRA the adapter at `lora.path`, else a fresh one, which
    adds exactly nothing to the model. Every call gives the same.

    Args:
      frozen: what `load_frozen` gives for the policy.
    """
    if frozen is None:
        return _load_model(policy, policy.decoder, mesh)
    if not policy.lora.path:
        return lora.init_adapter(policy.seed, frozen, policy.decoder, mesh)
    return peft.load_adapter(policy.lora.path, frozen, policy.decoder, _find_family(policy), mesh)


def load_reference(
    policy: Policy, mesh: Mesh, *, path: str, run: Config | None
) -> tuple[Params, Frozen | None]:
    """Load what a policy is compared with, in its own architecture; as `load_trained`.

    Args:
      path: of the reference.
      run: the run that trained the policy; where `path` is empty, what it started from is the
        reference.
    """
    if path or run is None:
        logger.info("reference: %s", path)
        settings = dataclasses.replace(
            policy.settings, path=path, checkpoint="auto", random_init=False
        )
        found = _describe(sources.find_source(settings), (), policy.seed)
        return load_trained(dataclasses.replace(found, decoder=policy.decoder), mesh)
    run = sources.use_final(run)
    own = start_policy(run)
    # The rows of new tokens were made when the run began, and its base is held as it held it.
    decoder = dataclasses.replace(
        policy.decoder,
        new_rows=own.decoder.new_rows,
        new_rows_init=own.decoder.new_rows_init,
    )
    own = dataclasses.replace(own, decoder=decoder, base_dtype=own.decoder.compute_dtype)
    logger.info("reference: %s", run.model.path)
    frozen = load_frozen(own, mesh)
    return load_start(own, mesh, frozen), frozen


def _describe(found: Source, control: Collection[str], seed: int) -> Policy:
    """Return the policy of a source; a checkpoint is read as its run wrote it."""
    run = found.run
    own = run.data.control if run is not None else ()
    decoder, renderer = _read_model(found.settings, {*control, *own})
    policy = Policy(found, decoder, renderer, seed=seed)
    if run is None or found.checkpoint is None:
        return policy
    # The base as the run itself holds it, whatever this job computes in.
    policy = dataclasses.replace(
        policy, lora=run.lora, seed=run.seed, base_dtype=run.model.compute_dtype
    )
    return policy.with_head() if TASKS[run.task].policy == "classifier" else policy


def _read_model(settings: ModelConfig, control: Collection[str]) -> tuple[DecoderConfig, Renderer]:
    """Read a model's architecture and renderer, with a row for each of the latter's tokens.

    The params of the former, `hf.load_or_init_params` of it, have the rows of new tokens filled.

    Raises:
      ConfigError: where there is no usable tokenizer.
      ModelError: where there is no usable model, or it and the tokenizer do not fit.
    """
    decoder = hf.load_decoder_config(settings.path, settings)
    if decoder.gating is not None:
        raise ModelError(
            f"model.path: got {settings.path!r}, a reward model with a gating network; allowed: a "
            "language model, or a classifier with a linear head; this one can be reward.path"
        )
    renderer = load_policy_renderer(settings, control)
    vocabulary = renderer.tokenizer.get_vocab()
    return vocab.fit_vocab(decoder, vocabulary, renderer.new_tokens, settings), renderer


def _load_model(policy: Policy, decoder: DecoderConfig, mesh: Mesh) -> Params:
    allow_new = ("score",) if decoder.num_labels else ()
    return hf.load_or_init_params(policy.settings, decoder, mesh, policy.seed, allow_new=allow_new)


def _find_family(policy: Policy) -> Family:
    return families.get_family(hf.read_hf_config(hf.resolve_model(policy.settings.path)))
