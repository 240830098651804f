"""What the reference and the starting policy say of the data of a task that trains once."""

import functools
from collections.abc import Callable, Sequence

from halos_jax.config import Config, ConfigError
from halos_jax.losses import Loss
from halos_jax.policies.policy import Policy
from halos_jax.policies.reference import load_sft
from halos_jax.training import loop as training
from halos_jax.training.loop import Dataset, Trainer
from halos_jax.training.proximal import add_proximal
from halos_jax.training.reference import refer
from halos_jax.types import Item, Params


def add_fixed(
    trainer: Trainer,
    dataset: Dataset,
    held_out: Dataset | None,
    load_params: Callable[[], Params],
    policy: Policy,
) -> tuple[Dataset, Dataset | None]:
    """Add the reference's log-probs, and what the starting policy says, as far as the loss asks.

    Args:
      load_params: returns the params of the starting policy, which is also the reference unless
        `policy` has one of its own.

    Raises:
      ConfigError: as `_refuse_unsampled`.
    """
    config, loss = trainer.config, trainer.loss
    moving = config.rounds.reference == "previous_step"
    needed = training.needs_reference(loss, dataset.items, moving=moving)
    needed_eval = held_out is not None and training.needs_reference(loss, held_out.items)
    if not (needed or needed_eval or loss.value or (loss.sampled and loss.old)):
        return dataset, held_out
    load_params, other = functools.cache(load_params), policy.reference
    is_start = other is None and not config.branch.workdir  # the reference is what it starts from
    if not is_start:
        for one in (dataset, held_out):
            _refuse_unsampled(loss, config, one.items if one is not None else ())
    if needed or needed_eval:
        referring = refer(trainer, None if other is None else other.decoder)
        params = load_params() if is_start else load_sft(policy, trainer.mesh, trainer.frozen)
        if needed:
            dataset = training.add_reference(referring, dataset, params, label="reference")
        if held_out is not None and needed_eval:
            held_out = training.add_reference(referring, held_out, params, label="reference eval")
        del params
    if loss.value:
        dataset = training.add_collected(
            trainer, dataset, load_params(), seed=config.seed, label="values"
        )
    else:
        known = dataset.reference_logps if is_start else None
        dataset = add_proximal(trainer, dataset, load_params, known=known, label="start")
    return dataset, held_out


def _refuse_unsampled(loss: Loss, config: Config, items: Sequence[Item]) -> None:
    """Refuse examples for which the reference would stand in for the policy that sampled them."""
    lacking = sum(not item.old_logps for item in items)
    if not (loss.old and not loss.value and lacking):
        return
    given = {"model.reference": config.model.reference, "branch.workdir": config.branch.workdir}
    field, value = next((name, one) for name, one in given.items() if one)
    raise ConfigError(
        f"{field}: got {value!r}, but loss {loss.name!r} compares the policy with the one that "
        f"sampled, and {lacking} of {len(items)} examples lack its log-probabilities ('logps' in "
        "the records), in whose place a reference would stand that is not the start; allowed: "
        "examples that all have them; sample with --config.sampling.keep_logps=true, or set "
        f"--config.{field}=''"
    )
