"""The policy at the start of a round, where a loss corrects the samples to be as if from it."""

import dataclasses
from collections.abc import Callable

from halos_jax.packing.token_values import TokenValues
from halos_jax.training.loop import Dataset, Trainer, compute_logps
from halos_jax.types import Params


def add_proximal(
    trainer: Trainer,
    dataset: Dataset,
    load_params: Callable[[], Params],
    *,
    known: TokenValues | None = None,
    label: str,
) -> Dataset:
    """Return `dataset` with the log-probs of the policy at the start, if the loss needs them.

    It does if it has a ratio to the old policy and corrects for the one that sampled. A loss with a
    value head finds them by `loop.add_collected`.

    Args:
      load_params: returns the params of that policy.
      known: its log-probs, where another pass has found them.
      label: of the progress bar.
    """
    loss = trainer.loss
    if not (loss.sampled and loss.old):
        return dataset
    name = f"{dataset.recurring} pass" if dataset.recurring else ""
    logps = known or compute_logps(
        trainer, dataset.items, load_params(), recurring=name, label=label
    )
    return dataclasses.replace(dataset, proximal_logps=logps)
