"""Whether the learning rate suits what is trained, and whether anything was learnt at all."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halos_jax.config import Config
from halos_jax.config.tasks import TASKS
from halos_jax.console.stages import show_count
from halos_jax.losses import get_loss
from halos_jax.metrics import read_metrics
from halos_jax.models import spec
from halos_jax.models.spec import DecoderConfig

logger = logging.getLogger(__name__)

# A model with fewer parameters takes much higher rates: whether one is too high is not known.
_SMALL = 50_000_000
# Models beyond this number of parameters are trained at lower rates: Llama 3.1 8B and 70B were
# fine-tuned at 5e-6 and 2e-6 (Lambert et al. 2024, Tulu 3).
_LARGE = 3_000_000_000
_LARGER = 4.0  # what the lowest rate is divided by for such a model

# The share of the held-out loss by which a run that has learnt anything has lowered it at least.
_LEAST_FALL = 0.005


class Suited(NamedTuple):
    """The lowest and highest rate that suit a kind of training, and one to begin with.

    `preset` is the one that has this rate.
    """

    low: float
    high: float
    rate: float
    preset: str


# (what is trained, whether an adapter is) -> rates. The presets' docstrings have the measurements.
SUITED: Mapping[tuple[str, bool], Suited] = {
    ("sft", False): Suited(8e-6, 2e-4, 1e-5, "sft"),
    ("sft", True): Suited(5e-5, 2e-3, 2e-4, "sft"),
    ("reward_model", False): Suited(4e-6, 1e-4, 1e-5, "reward_model"),
    ("reward_model", True): Suited(2e-5, 2e-3, 1e-4, "reward_model"),
    ("policy", False): Suited(1e-7, 1e-5, 2e-6, "online_dpo"),
    ("policy", True): Suited(2e-6, 2e-4, 2e-5, "lora"),
}


def warn_of_rate(config: Config, decoder: DecoderConfig) -> None:
    """Warn if the learning rate is far from those that suit what is trained; see `check_rate`."""
    line = check_rate(config, spec.count_params(decoder))
    if line:
        logger.warning("%s", line)


def check_rate(config: Config, num_params: int | None) -> str:
    """Say that the learning rate is far from those that suit what is trained; "" if it is not.

    Nothing is said of other optimizers than Adam's, whose rates are of another scale.

    Args:
      num_params: of the model; None if they are not known.
    """
    kind, is_adapter = _classify(config), bool(config.lora.rank or config.lora.path)
    rate = config.optimizer.learning_rate
    if not kind or config.optimizer.name != "adamw":
        return ""
    suited = SUITED[kind, is_adapter]
    low = suited.low / (_LARGER if num_params and num_params > _LARGE else 1)
    can_be_high = num_params is not None and num_params >= _SMALL and not config.model.random_init
    if rate < low:
        what, then = "low", "with so small steps it may learn next to nothing"
    elif rate > suited.high and can_be_high:
        what, then = "high", "it may lose what the model could do before"
    else:
        return ""
    loss = TASKS[config.task].loss or config.loss["name"]
    trained = "a LoRA adapter" if is_adapter else "all weights"
    return (
        f"optimizer.learning_rate={rate:g} is {what} for loss {loss!r} on {trained}, where "
        f"{low:.2g} to {suited.high:g} are usual: {then}; try "
        f"--config.optimizer.learning_rate={suited.rate:g} (preset {suited.preset!r}: configs/"
        "README.md has the rates of each task)"
    )


def _classify(config: Config) -> str:
    """Return what is trained: "sft", "reward_model", "policy"; "" if rates for it are unknown."""
    task = TASKS[config.task]
    if not task.trains:
        return ""
    if task.loss:
        return "sft" if task.policy == "language" else "reward_model"
    loss = get_loss(config.loss)
    if loss.needs == "scores":
        return "reward_model"
    return "policy" if loss.reference or loss.old else ""


def warn_of_standstill(config: Config, workdir: Path) -> None:
    """Warn if a training run has left its held-out loss where it was; see `describe_standstill`."""
    path = workdir / "metrics.jsonl"
    line = describe_standstill(config, read_metrics(path) if path.exists() else ())
    if line:
        logger.warning("%s", line)


def describe_standstill(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say that the held-out loss is where it was at the start; "" if it is not, or not known.

    Args:
      rows: those of metrics.jsonl, each with its "step".
    """
    losses = [(row["step"], row["loss/eval"]) for row in rows if "loss/eval" in row]
    if len(losses) < 2 or losses[0][0] != 0:
        return ""
    (_, first), (steps, last) = losses[0], losses[-1]
    change = last / first - 1 if first > 0 else math.nan
    if not change > -_LEAST_FALL:
        return ""
    what, ways = ("rose", "a lower") if change > _LEAST_FALL else ("hardly changed", "a higher")
    return (
        f"the held-out loss {what}: {first:.4f} at the start, {last:.4f} after "
        f"{show_count(steps, 'steps')} at optimizer.learning_rate="
        f"{config.optimizer.learning_rate:g}; try {ways} rate, or train on more examples"
    )
