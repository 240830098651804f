"""The learning-rate schedule and the optimizer of a config, made with optax."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from halos_jax.config import Config, OptimizerConfig
from halos_jax.types import Params, Tree

logger = logging.getLogger(__name__)

# Weights [L, ...] that Muon orthogonalises: name -> (reduction axes, output axes).
_MUON_AXES = {
    **dict.fromkeys(("q", "k", "v"), ((1,), (2, 3))),
    "o": ((1, 2), (3,)),
    **dict.fromkeys(("gate", "up", "down"), ((1,), (2,))),
    **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), ((2,), (3,))),
}


@dataclasses.dataclass(frozen=True)
class BudgetSchedule:
    """The learning rate of a run whose number of steps cannot be known at its start.

    It warms up over steps and is constant then: that is what the object gives as an
    `optax.Schedule`. `decay` maps the share of the run's prompts that are used, f32[], to what the
    rate of a step is multiplied by.
    """

    rise: optax.Schedule
    decay: Callable[[jax.Array], jax.Array]

    def __call__(self, count: ArrayLike) -> jax.Array:
        """Return the learning rate after `count` steps, apart from its decay."""
        return jnp.asarray(self.rise(count))


def has_unknown_steps(config: Config) -> bool:
    """Tell whether a run decides on the way how many steps it takes."""
    chooses = (
        config.feedback.min_examples > 0,
        config.rounds.prompts_per_round == "auto",
        config.guard.action == "retry",
    )
    return config.task == "online" and any(chooses)


def decays_by_budget(config: Config) -> bool:
    """Tell whether the learning rate decays with the prompts that are used, not with the steps."""
    return has_unknown_steps(config) and config.optimizer.schedule != "constant"


def make_run_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Return the schedule of a run that is expected to take `total_steps`.

    If it may take fewer or more, the decay is that of the schedule's name over the share of the
    prompts, from all of the rate at 0 to none at 1: linearly, as a cosine, or, with "wsd", linearly
    over the last `decay_fraction`.
    """
    if not decays_by_budget(config):
        return make_schedule(config.optimizer, total_steps)
    rise = make_schedule(dataclasses.replace(config.optimizer, schedule="constant"), total_steps)
    last = config.optimizer.decay_fraction if config.optimizer.schedule == "wsd" else 1.0

    def decay(share: jax.Array) -> jax.Array:
        left = jnp.clip(1.0 - share, 0.0, 1.0)
        if config.optimizer.schedule == "cosine":
            return 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        return jnp.minimum(left / last, 1.0) if last else jnp.where(left > 0, 1.0, 0.0)

    return BudgetSchedule(rise, decay)


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps taken so far.

    It warms up linearly from `warmup_start * learning_rate`. Then it is constant, or decays to 0 at
    `total_steps`, linearly or as a cosine; with "wsd" it is constant and decays linearly to 0 over
    the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM). The warm-up is a whole number
    of steps and ends before the last step, so that even a short run reaches the peak.
    """
    peak = config.learning_rate
    warmup = count_warmup(config, total_steps)
    decay_steps = max(total_steps - warmup, 1)
    main = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "wsd": _make_stable_decay(peak, decay_steps, round(config.decay_fraction * total_steps)),
    }[config.schedule]
    if warmup == 0:
        return main
    rise = optax.linear_schedule(config.warmup_start * peak, peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


def count_warmup(config: OptimizerConfig, total_steps: int) -> int:
    """Return how many steps of a run of `total_steps` are warm-up."""
    warmup = config.warmup_steps
    if warmup < 0:
        warmup = round(config.warmup_fraction * total_steps)
    return min(warmup, max(total_steps - 1, 0))


def keep_warmup(config: OptimizerConfig, first_steps: int, total_steps: int) -> OptimizerConfig:
    """Return the optimizer config of a run that was started for `first_steps` and now takes more.

    The warm-up stays as it was at the start; a decay follows the new number of steps.
    """
    if first_steps == total_steps:
        return config
    warmup = count_warmup(config, first_steps)
    logger.info(
        "the schedule (%s) is laid out for %d steps from here on, %d at the start; its warm-up "
        "stays %d steps",
        config.schedule,
        total_steps,
        first_steps,
        warmup,
    )
    return dataclasses.replace(config, warmup_steps=warmup)


def _make_stable_decay(peak: float, steps: int, decay: int) -> optax.Schedule:
    decay = min(max(decay, 1), steps)
    fall = optax.linear_schedule(peak, 0.0, decay)
    return optax.join_schedules([optax.constant_schedule(peak), fall], [steps - decay])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return global-norm clipping followed by the optimizer `config.name`.

    "adamw" (Loshchilov & Hutter 2019), "adafactor" (Shazeer & Stern 2018), "lion" (Chen et al.
    2023), "sgd" (with momentum `beta1`), or "muon" (Jordan et al. 2024; AdamW for embeddings, head
    and norms). `_choose_decayed` chooses the params with weight decay. Moments have the dtype
    `moments_dtype`, whatever the dtype of the params: in bfloat16 the second moment would lose
    updates smaller than 1/256 of itself. Gradient norms are always computed in float32. The
    gradient of a value head (`params["value"]`) is clipped by its own norm, to
    `value_max_grad_norm`.
    """
    mask = functools.partial(_choose_decayed, config=config)
    decayed = {"weight_decay": config.weight_decay, "mask": mask}
    betas = {"b1": config.beta1, "b2": config.beta2}
    if config.name == "adamw":
        inner = optax.adamw(schedule, **betas, eps=config.eps, **decayed)
    elif config.name == "lion":
        inner = optax.lion(schedule, **betas, **decayed)
    elif config.name == "adafactor":
        # optax's adafactor does not multiply its own decay by the learning rate, so it is not used.
        inner = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.adafactor(schedule, multiply_by_parameter_scale=False),
        )
    elif config.name == "sgd":
        inner = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.sgd(schedule, momentum=config.beta1),
        )
    else:
        inner = optax.contrib.muon(
            schedule,
            beta=config.beta1,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
            # Scale Muon's updates to the size of AdamW's, so that both can share a learning rate.
            consistent_rms=0.2,
        )
        inner = _show_decayed(inner, mask)
    inner = _keep_dtype(inner, jnp.dtype(config.moments_dtype))
    clip = _keep_dtype(_clip_parts(config.max_grad_norm, config.value_max_grad_norm), jnp.float32)
    return optax.chain(clip, inner)


def _clip_parts(policy_norm: float, value_norm: float) -> optax.GradientTransformation:
    """Clip the gradients of the policy and of the value head, each by its own global norm."""

    def update(updates: Params, params: Params | None = None) -> Params:
        clipped: Params = {}
        for is_value, norm in ((False, policy_norm), (True, value_norm)):
            own = {name: part for name, part in updates.items() if (name == "value") == is_value}
            clipped |= optax.clip_by_global_norm(norm).update(own, optax.EmptyState())[0]
        return {name: clipped[name] for name in updates}

    return optax.stateless(update)


def _muon_dimensions(params: Params) -> Tree:
    def find(path: tuple[object, ...], leaf: jax.Array) -> Tree:
        names = _names(path)
        if names[:1] != ["layers"]:
            return None
        axes = _MUON_AXES.get(names[-1]) or _find_adapter_axes(names[-1], leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(*axes) if axes else None

    return jax.tree_util.tree_map_with_path(find, params)


def _find_adapter_axes(name: str, ndim: int) -> tuple[tuple[int, ...], ...] | None:
    """Return the axes of a LoRA matrix, [L, in..., R] or [L, R, out...]; None for other params."""
    if name.endswith("_lora_a"):
        return tuple(range(1, ndim - 1)), (ndim - 1,)
    return ((1,), tuple(range(2, ndim))) if name.endswith("_lora_b") else None


def _choose_decayed(params: Params, config: OptimizerConfig) -> Tree:
    """Return which params decay: all, but norms only with `decay_norms`, biases `decay_biases`."""

    def find(path: tuple[object, ...], _: jax.Array) -> bool:
        name = _names(path)[-1]
        if "norm" in name:
            return config.decay_norms
        return config.decay_biases or not name.endswith("_bias")

    return jax.tree_util.tree_map_with_path(find, params)


def _show_decayed(
    inner: optax.GradientTransformation, mask: Callable[[Params], Tree]
) -> optax.GradientTransformation:
    """Run `inner` with zeros in place of the params that should not decay.

    It reads params only for weight decay. This replaces muon's own mask, which does not apply to
    the params that it hands to AdamW.
    """

    def update(updates: Params, state: Tree, params: Params | None = None) -> tuple[Params, Tree]:
        assert params is not None  # optax passes them to transformations with weight decay
        shown = jax.tree.map(lambda p, d: p if d else jnp.zeros_like(p), params, mask(params))
        updated: tuple[Params, Tree] = inner.update(updates, state, shown)
        return updated

    return optax.GradientTransformation(inner.init, update)


def _names(path: tuple[object, ...]) -> list[str]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _keep_dtype(
    inner: optax.GradientTransformation, dtype: DTypeLike
) -> optax.GradientTransformation:
    """Run `inner` with its state, and all its arithmetic, in `dtype`."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params: Params) -> Tree:
        return inner.init(cast(params))

    def update(updates: Params, state: Tree, params: Params | None = None) -> tuple[Params, Tree]:
        updated: tuple[Params, Tree] = inner.update(cast(updates), state, cast(params))
        return updated

    return optax.GradientTransformation(init, update)
