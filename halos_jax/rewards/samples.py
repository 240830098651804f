"""Feedback of samples as they are, for losses that need no rewards, and runs without a reward."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES, REWARD_KINDS
from halos_jax.data.records import formats
from halos_jax.rewards.feedback import Rows
from halos_jax.types import FINISH_LENGTH, Sample


def make_samples(config: Config, scored: Sequence[Sample], round: int) -> Rows:
    """Return the records of all samples, with their rewards where they have one.

    The counts have: prompts; examples (the samples); truncated (those cut by the token limit).
    """
    counts = {
        "prompts": len({sample.prompt.prompt_id for sample in scored}),
        "examples": len(scored),
        "truncated": sum(sample.finish_reason == FINISH_LENGTH for sample in scored),
    }
    return [formats.sample_to_record(one) for one in scored], counts


def warn_of_samples(config: Config, counts: Mapping[str, int]) -> str:
    """Return no warning: every sample teaches."""
    return ""


def check_no_reward(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each field that asks for rewards in a run that has none.

    Args:
      values: path -> value of every field of the config, of a task that is scored.
    """
    named = [path.removesuffix(".kind") for path in values if path.endswith(".kind")]
    kinds = [kind for kind, spec in REWARD_KINDS.items() if spec.scores]
    for path in named:
        if path != "reward" and not _scores(values[f"{path}.kind"]):
            yield (
                f"{path}.kind: got 'none', which gives no score; allowed: "
                f"{', '.join(map(repr, kinds))}; or leave it out"
            )
    if _scores(values["reward.kind"]) or any(one.startswith("reward.parts.") for one in named):
        return
    task, feedback = values["task"], values["feedback.type"]
    if task == "online" and FEEDBACK_TYPES[feedback].scored:
        able = [repr(name) for name, spec in FEEDBACK_TYPES.items() if not spec.scored]
        yield (
            f"reward.kind: got 'none', but feedback.type={feedback!r} is made of rewards; allowed: "
            f"{', '.join(map(repr, kinds))}; or feedback.type={', '.join(able)} with a loss that "
            "needs none, such as gkd"
        )
    elif task in ("label", "sample"):
        yield (
            f"reward.kind: got 'none', but task={task!r} is to score samples; allowed: "
            f"{', '.join(map(repr, kinds))}"
        )
    for path, off in (("reward.missing_eos_penalty", 0.0), ("reward.cut_at_sentence", False)):
        if values[path] != off:
            yield f"{path}: got {values[path]}, allowed with reward.kind='none': {off}"


def _scores(kind: str) -> bool:
    return all(spec.scores for name, spec in REWARD_KINDS.items() if name == kind)
