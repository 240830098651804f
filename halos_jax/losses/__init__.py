"""Objectives: pure functions of log-probabilities, found by name in one registry."""

from halos_jax.losses import preference, reference_free, reward, supervised
from halos_jax.losses.registry import (
    Loss,
    LossInputs,
    LossTerms,
    check_feedback,
    check_loss,
    get_loss,
    list_losses,
    register,
)

__all__ = [
    "Loss",
    "LossInputs",
    "LossTerms",
    "check_feedback",
    "check_loss",
    "get_loss",
    "list_losses",
    "preference",
    "reference_free",
    "register",
    "reward",
    "supervised",
]
