"""The second policy of an evaluation: what `eval.against` names."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from jax.sharding import Mesh

from halos_jax.checkpoints.failures import CheckpointError
from halos_jax.config import Config, ConfigError
from halos_jax.models.hf.families import ModelError
from halos_jax.models.lora import Frozen
from halos_jax.policies.policy import (
    Policy,
    find_policy,
    load_frozen,
    load_start,
    load_trained,
    start_policy,
)
from halos_jax.policies.source import find_origin, find_start, use_final
from halos_jax.types import Params

SFT = "sft"  # as eval.against: what the run of the first policy started from


def find_against(config: Config, first: Policy, *, recorded: str = "") -> Policy:
    """Find the policy that `eval.against` names; it is read with the settings of `model`.

    Args:
      first: the policy of `model.path`.
      recorded: as in `source.find_source`.

    Raises:
      ConfigError, CheckpointError: if there is no such policy.
      ModelError: if it cannot be read.
    """
    named = config.eval.against
    if named == SFT:
        return _find_sft(config, first)
    settings = dataclasses.replace(
        config.model, path=named, checkpoint=config.eval.against_checkpoint, random_init=False
    )
    with _name_fields():
        found = find_policy(
            settings, control=config.data.control, recorded=recorded, seed=config.seed
        )
        found.refuse_classifier(named)
    return found


def load_policy(policy: Policy, mesh: Mesh) -> tuple[Params, Frozen | None]:
    """Load what a policy samples with, as `policy.load_trained`; also what a run started from."""
    if policy.source.checkpoint is not None:
        return load_trained(policy, mesh)
    frozen = load_frozen(policy, mesh)
    return load_start(policy, mesh, frozen), frozen


def _find_sft(config: Config, first: Policy) -> Policy:
    run = find_origin(first.source)
    if run is None:
        raise ConfigError(
            f"eval.against: got {SFT!r}, but model.path={config.model.path!r} is not the workdir "
            "of the run that trained it, so what it started from is not known; allowed: the path "
            f"of that model (a folder of this name is './{SFT}')"
        )
    run = use_final(run)
    source = find_start(config.model, run)
    own = start_policy(dataclasses.replace(run, model=source.settings))
    # As in the run: the base of an adapter has the dtype that the run computes in.
    return dataclasses.replace(own, source=source, base_dtype=run.model.compute_dtype)


@contextlib.contextmanager
def _name_fields() -> Iterator[None]:
    """Call the fields of `model` by those of `eval.against` in errors of the block."""
    try:
        yield
    except (ConfigError, ModelError, CheckpointError) as error:
        text = re.sub(r"(?<!--config\.)\bmodel\.path\b", "eval.against", str(error))
        text = re.sub(r"\bmodel\.checkpoint\b", "eval.against_checkpoint", text)
        raise type(error)(text) from error
