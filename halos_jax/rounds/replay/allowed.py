"""Combinations with `feedback.replay` that make no sense, on the config's flat values."""

from collections.abc import Iterable, Mapping
from typing import Any

from halos_jax.losses import get_loss


def check_replay(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each reason why a run cannot replay what it is to replay."""
    share, task = values["feedback.replay"], values["task"]
    if not share:
        return
    if task != "online":
        yield (
            f"feedback.replay: got {share:g}, allowed with task={task!r}: 0; only the rounds of "
            "task='online' have earlier ones to replay"
        )
        return
    size, total = values["rounds.prompts_per_round"], values["rounds.total_prompts"]
    if size != "auto" and total <= size:
        yield (
            f"feedback.replay: got {share:g}, but rounds.total_prompts={total} are one round, "
            f"with none before it; allowed: 0, or rounds.prompts_per_round of less than {total}"
        )
    settings = {path[5:]: values[path] for path in values if path.startswith("loss.")}
    try:
        loss = get_loss(settings)
    except ValueError:  # the loss's own check says what is wrong
        return
    if loss.value:
        yield (
            f"feedback.replay: got {share:g}, allowed with loss {loss.name!r}: 0; its advantages "
            "are measured by the value head at the start of the round, and hold for samples of "
            "that policy alone"
        )
