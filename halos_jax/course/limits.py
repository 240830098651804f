"""Checks of the guard's fields that types cannot express: what the run cannot measure or do."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from halos_jax.config import Config, schema
from halos_jax.config.limits import list_scorers
from halos_jax.config.tasks import load
from halos_jax.integers import divide_up

logger = logging.getLogger(__name__)

# Field of an online run that looks at held-out samples -> values for which it does not.
_WATCHES = {"rounds.keep_best": (False, "auto"), "guard.scorer": ("",)}


def check_guard(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each part of the guard that the run has not got the means for."""
    retries = values["guard.action"] == "retry"
    watches = _WATCHES | ({"guard.action": ()} if retries else {})
    for path, others in watches.items():
        is_watched = values["data.eval"] or values["data.holdout"]
        if values[path] not in others and not is_watched:
            yield (
                f"{path}: got {values[path]!r}, but there are no held-out prompts to measure "
                "rounds with; set --config.data.holdout=N or --config.data.eval=FILE"
            )
    if retries and values["rounds.keep_best"] is False:
        yield (
            "rounds.keep_best: got False, but guard.action='retry' goes back to the best round; "
            "allowed: 'auto' or True; or set --config.guard.action=stop"
        )
    scorer = values["guard.scorer"]
    names = [path.removeprefix("eval.scorers.") for path in list_scorers(values)]
    names += [name.rpartition(":")[2] for name in values["reward.rules"]]
    if scorer and scorer not in names:
        allowed = ", ".join(names) or "none is set"
        yield f"guard.scorer: got {scorer!r}, allowed: one of eval.scorers: {allowed}"
    yield from _check_signs(values)
    yield from _check_rounds(values)


# Bound on a round's samples -> the value for which it is off.
_ON_SAMPLES = {
    "guard.max_kl": 0,
    "guard.min_margin": "off",
    "guard.max_truncated": 1,
    "guard.max_length_change": 0,
}


def _check_signs(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse a bound on a sign that is measured on watched samples alone, where none is watched."""
    if values["guard.max_kl"] and not values["rounds.watch_samples"]:
        yield (
            f"guard.max_kl: got {values['guard.max_kl']:g}, but rounds.watch_samples=0 leaves the "
            "KL of every round unknown; allowed: 0; or set --config.rounds.watch_samples=128"
        )
    if (
        values["guard.min_margin"] != "off"
        and not values["rounds.watch_samples"]
        and _has_no_pass(values)
    ):
        yield (
            f"guard.min_margin: got {values['guard.min_margin']}, but rounds.watch_samples=0 with "
            "a loss that needs no reference leaves the margin of every round unknown; allowed: "
            "'off'; or set --config.rounds.watch_samples=128"
        )


def _has_no_pass(values: Mapping[str, Any]) -> bool:
    """Tell whether no log-probability under the SFT checkpoint is computed for the loss."""
    try:
        settings = {path[5:]: values[path] for path in values if path.startswith("loss.")}
        loss = load("halos_jax.losses:get_loss")(settings)
    except ValueError:  # the loss's own check says what is wrong
        return False
    return not loss.reference and not loss.old


def _check_rounds(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse bounds that the run has too few rounds to break, or to do anything about it.

    With rounds of a size that the run chooses, their number is not known.
    """
    size = values["rounds.prompts_per_round"]
    if size != "auto":
        yield from _find_idle(values, divide_up(values["rounds.total_prompts"], size))


def warn_of_idle(config: Config, rounds: int) -> None:
    """Warn of bounds that a run of `rounds`, as the data allow, cannot do anything about."""
    values = dict(schema.flatten(schema.to_plain(config)))
    if values["rounds.prompts_per_round"] != "auto":
        for line in _find_idle(values, rounds):
            logger.warning("%s", line)


def _find_idle(values: Mapping[str, Any], rounds: int) -> Iterable[str]:
    every = values["rounds.eval_every"]
    watched = bool(values["data.eval"] or values["data.holdout"])
    on_samples = any(values[path] != off for path, off in _ON_SAMPLES.items())
    on_held_out = watched and (values["guard.fall"] or bool(values["guard.scorer"]))
    if not on_samples and not on_held_out:
        return
    action, patience = values["guard.action"], values["guard.patience"]
    evaluated = divide_up(rounds, every)  # after round 0; the last one always is
    measured = rounds if on_samples else evaluated
    if not on_samples and action != "warn" and 1 < every >= rounds:
        yield (
            f"rounds.eval_every: got {every}, but the run has {rounds} rounds, so only the last "
            f"is evaluated, too late for guard.action={action!r}; allowed: less than {rounds}; "
            "lower it, or set a bound on the rounds' samples, such as guard.max_kl"
        )
    elif patience > measured:
        what = "" if on_samples else f", of which {evaluated} are evaluated"
        yield (
            f"guard.patience: got {patience}, but the run has {rounds} rounds{what}, so no bound "
            f"would ever count as broken; allowed: at most {measured}"
        )
