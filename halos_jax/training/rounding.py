"""Warnings about weights whose updates are lost to rounding, because of the dtype they have."""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from halos_jax.config import OptimizerConfig
from halos_jax.losses.sequences import Scalar
from halos_jax.training.optim import count_warmup
from halos_jax.types import Params

logger = logging.getLogger(__name__)

# Below this learning rate bfloat16 loses most updates: it rounds away what is less than about 1/256
# of a weight, and a step moves a weight by about the learning rate (with SGD, by any amount).
_COARSE_RATE = 1e-5

_STEPS = 10  # steps after the warm-up over which the share of moved weights is averaged
_FEW = 0.1  # share below which there is a warning


def warn_of_rounding(config: OptimizerConfig, params_dtype: str) -> None:
    """Warn if most updates of the weights are likely to be too small for `params_dtype`."""
    if params_dtype == "bfloat16" and config.name != "sgd" and config.learning_rate < _COARSE_RATE:
        logger.warning(
            "model.params_dtype=bfloat16 with optimizer.learning_rate=%g: a step moves a weight by "
            "about that much, and bfloat16 rounds away what is less than about 1/256 of it, so "
            "that most weights will stay as they are; set --config.model.params_dtype=float32, or "
            "a rate of %g or more",
            config.learning_rate,
            _COARSE_RATE,
        )


def measure_moved(before: Params, after: Params, gradient: Params) -> Scalar | None:
    """Return the share of weights whose stored value a step has changed.

    Only weights narrower than float32 count, and only those whose gradient is not zero (that of the
    embedding of a token that does not occur is). 1 if there are none; None if all weights are
    float32.
    """
    parts = map(jax.tree.leaves, (before, after, gradient))
    narrow = [part for part in zip(*parts, strict=True) if part[0].dtype.itemsize < 4]
    if not narrow:
        return None
    moved = sum(_count((x != y) & (g != 0)) for x, y, g in narrow)
    total = jnp.asarray(sum(_count(g != 0) for *_, g in narrow))
    return jnp.where(total > 0, moved / jnp.maximum(total, 1.0), 1.0)


def _count(mask: jax.Array) -> Scalar:
    # Integers within each entry of the first axis: a float32 sum of ones would stop at 2^24.
    inner = tuple(range(1, mask.ndim))
    return jnp.sum(jnp.sum(mask, axis=inner, dtype=jnp.int32).astype(jnp.float32))


def choose_watched(config: OptimizerConfig, total_steps: int) -> range:
    """Return the first steps of a run (numbered from 1) after its warm-up."""
    warmup = count_warmup(config, total_steps)
    return range(warmup + 1, min(warmup + _STEPS, total_steps) + 1)


class MovedWatch:
    """Warns once, when the watched steps are done, if they moved few of the weights.

    In a stage that resumes in the middle of them, it judges by those that remain.
    """

    def __init__(self, steps: range) -> None:
        self._steps = steps
        self._shares: list[jax.Array] = []
        self._is_over = False

    def see(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Note the step's `moved_params`, without waiting for its value."""
        if step in self._steps and "moved_params" in metrics:
            self._shares.append(metrics["moved_params"])
            self._is_over = step == self._steps[-1]
        elif self._is_over:
            self.finish()

    def finish(self) -> None:
        """Warn if the last of the watched steps is done and few weights moved."""
        if not (self._is_over and self._shares):
            return
        count, share = len(self._shares), float(np.mean([float(x) for x in self._shares]))
        self._shares.clear()
        if share < _FEW and jax.process_index() == 0:
            logger.warning(
                "moved_params: a step changed %.2g %% of the weights with a gradient, on average "
                "over steps %d to %d; the others stayed as they are, since "
                "model.params_dtype=bfloat16 rounds away an update of less than about 1/256 of "
                "its weight; start again with --config.model.params_dtype=float32, or with a "
                "larger optimizer.learning_rate",
                100 * share,
                self._steps[-1] - count + 1,
                self._steps[-1],
            )
