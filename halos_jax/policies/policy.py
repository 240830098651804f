"""A policy as a value: everything except its weights, which are loaded when they are needed.

    find_policy      the policy that `config.model` names: a model, a finished run, a checkpoint
    start_policy     the policy that training starts from, with the adapter of `config.lora`
    load_trained     the weights of a policy; `load_params` merges an adapter into its base
    load_start       the weights that training starts from, which are a run's reference "sft"
    load_reference   the weights that an evaluation compares a policy with

`final.export_policy` writes a policy to disk.
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
    """A policy without its weights.

    Attributes:
      source: where it comes from: its files, and the settings of its computation and rendering.
      decoder: its architecture, with an embedding row for each token of `renderer`.
      renderer: its tokenizer and chat template.
      lora: the adapter to train on top of it; with rank 0 and no path, all its params are trained.
      seed: for weights that are in no file and so are drawn.
      base_dtype: the dtype that an adapter's frozen base is held in; None: the compute dtype.
      reference: the model that `model.reference` names, see `reference.py`; None: the reference is
        what training starts from.
    """

    source: Source
    decoder: DecoderConfig
    renderer: Renderer
    lora: LoraConfig = LoraConfig()
    seed: int = 0
    base_dtype: Dtype | None = None
    reference: "Policy | None" = None

    @property
    def settings(self) -> ModelConfig:
        """The model's files, and the settings of its computation and rendering."""
        return self.source.settings

    def refuse_classifier(self, path: str) -> None:
        """Raise ConfigError, naming `path`, if the policy is a classifier and writes no text."""
        if self.decoder.num_labels:
            raise ConfigError(
                f"model.path: got {path!r}, a model that scores texts and writes none; allowed: a "
                "causal language model; a reward model goes to --config.reward.path"
            )

    def with_head(self) -> "Policy":
        """Return the policy with a score head: its own, or a new one if it has none."""
        labels = self.decoder.num_labels or 1
        return dataclasses.replace(
            self, decoder=dataclasses.replace(self.decoder, num_labels=labels)
        )


def find_policy(
    settings: ModelConfig, *, control: Collection[str] = (), recorded: str = "", seed: int = 0
) -> Policy:
    """Find the policy that `settings` name, in Hugging Face format or in a run's workdir.

    Args:
      control: additional tokens, as in `loading.load_policy_renderer`; those of the run that
        trained the policy are added by themselves.
      recorded: as in `source.find_source`.
      seed: for weights that are drawn (`model.random_init`).

    Raises:
      ConfigError, CheckpointError: if there is no such policy.
      ModelError: if it cannot be read.
    """
    return _describe(sources.find_source(settings, recorded=recorded), control, seed)


def start_policy(config: Config) -> Policy:
    """Return the policy that training starts from; `model.path` must not be a run's workdir."""
    decoder, renderer = read_model(config.model, config.data.control)
    source = Source(config.model.path, config.model)
    return Policy(source, decoder, renderer, config.lora, config.seed)


def load_params(policy: Policy, mesh: Mesh) -> Params:
    """Load the params of a policy for sampling, with an adapter merged into its base."""
    return lora.merge_adapter(*load_trained(policy, mesh))


def load_trained(policy: Policy, mesh: Mesh) -> tuple[Params, Frozen | None]:
    """Load a policy's trainable params and, if it is a checkpoint of an adapter, the frozen base.

    Raises:
      ModelError, CheckpointError: if they cannot be read.
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
    """Load the base that the policy's adapter is trained on; None if it has no adapter.

    The base is held in the compute dtype, or in fewer bits if `lora.base` says so. It needs no more
    precision: it is only read in forward passes, and never updated.

    Raises:
      ModelError: if the model lacks the target modules, or `lora.path` is no adapter for it.
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
    """Load the params that training starts from, which are also the run's reference "sft".

    They are the policy's model or, with LoRA, the adapter at `lora.path`. Without a path it is a
    new adapter, which adds exactly 0 to the model. Every call returns the same params.

    Args:
      frozen: the result of `load_frozen` for the policy.
    """
    if frozen is None:
        return _load_model(policy, policy.decoder, mesh)
    if not policy.lora.path:
        return lora.init_adapter(policy.seed, frozen, policy.decoder, mesh)
    return peft.load_adapter(policy.lora.path, frozen, policy.decoder, _find_family(policy), mesh)


def load_reference(
    policy: Policy, mesh: Mesh, *, path: str, run: Config | None
) -> tuple[Params, Frozen | None]:
    """Load the reference of a policy, in the policy's architecture; returns as `load_trained`.

    Args:
      path: of the reference; "": the model that `run` started from.
      run: the run that trained the policy.
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
    # As in the run: new tokens have the rows that it started with, the base has its dtype.
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
    """Return the policy of a source; for a checkpoint, with the settings of its run."""
    run = found.run
    own = run.data.control if run is not None else ()
    decoder, renderer = read_model(found.settings, {*control, *own})
    policy = Policy(found, decoder, renderer, seed=seed)
    if run is None or found.checkpoint is None:
        return policy
    # The base has the dtype that the run holds it in, whatever this job computes in.
    policy = dataclasses.replace(
        policy, lora=run.lora, seed=run.seed, base_dtype=run.model.compute_dtype
    )
    return policy.with_head() if TASKS[run.task].policy == "classifier" else policy


def read_model(settings: ModelConfig, control: Collection[str]) -> tuple[DecoderConfig, Renderer]:
    """Read a model's architecture and renderer; each of the renderer's tokens gets a row.

    `hf.load_or_init_params` for that architecture fills the rows of new tokens.

    Raises:
      ConfigError: if there is no usable tokenizer.
      ModelError: if there is no usable model, or the tokenizer does not fit it.
    """
    decoder = hf.load_decoder_config(settings.path, settings)
    if decoder.gating is not None:
        raise ModelError(
            f"model.path: got {settings.path!r}, a reward model with a gating network; allowed: a "
            "language model, or a classifier with a linear head; this one can be reward.path"
        )
    renderer = load_policy_renderer(settings, control)
    vocabulary = renderer.tokenizer.get_vocab()
    decoder = vocab.fit_vocab(decoder, vocabulary, renderer.new_tokens, settings)
    unknown = vocab.find_unknown(renderer.token_ids, decoder.vocab_size)
    return dataclasses.replace(decoder, unknown_rows=unknown), renderer


def _load_model(policy: Policy, decoder: DecoderConfig, mesh: Mesh) -> Params:
    allow_new = ("score",) if decoder.num_labels else ()
    return hf.load_or_init_params(policy.settings, decoder, mesh, policy.seed, allow_new=allow_new)


def _find_family(policy: Policy) -> Family:
    return families.get_family(hf.read_hf_config(hf.resolve_model(policy.settings.path)))
