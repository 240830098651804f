"""What an online run will use, in a few lines: rounds, samples, examples, steps, tokens, time."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS
from halos_jax.losses import get_loss
from halos_jax.packing.batches import count_steps
from halos_jax.training.optim import count_warmup, decays_by_budget, make_schedule

# With fewer optimizer steps a round, a few ties leave one or none, and what a round costs beside
# its training (weights for the sampler, a checkpoint, an evaluation) buys next to nothing.
FEW_STEPS = 4


class RoundSize(NamedTuple):
    """A round to come: its prompts, and the most examples and optimizer steps that they give."""

    prompts: int
    examples: int
    steps: int


class RoundDone(NamedTuple):
    """A finished round: what it has used. `seconds` is 0 where its time is not known."""

    prompts: int
    examples: int
    steps: int
    seconds: float


def describe_budget(config: Config, rounds: Sequence[RoundSize]) -> list[str]:
    """Return lines that say what a run of `rounds`, one or more, will use at most."""
    sampling, optimizer, noun = config.sampling, config.optimizer, name_examples(config)
    prompts, examples, steps = (sum(column) for column in zip(*rounds, strict=True))
    samples = prompts * sampling.num_samples_per_prompt
    warmup = count_warmup(optimizer, steps)
    sizes = [_show_range([one[column] for one in rounds]) for column in range(3)]
    return [
        f"budget: {len(rounds)} {_plural('round', len(rounds))} of {sizes[0]} prompts, "
        f"{prompts:,} in all{_describe_auto(config)}; {sampling.num_samples_per_prompt} samples a "
        f"prompt, {samples:,} in all, of at most {sampling.max_tokens:,} tokens, "
        f"{samples * sampling.max_tokens:,} in all",
        f"budget: at most {sizes[1]} {noun} and {sizes[2]} optimizer steps a round, {examples:,} "
        f"{noun} and {steps:,} steps in all; fewer where samples {_name_losses(config)}",
        f"budget: learning rate {optimizer.learning_rate:g} ({optimizer.schedule}) after "
        f"{warmup:,} {_plural('step', warmup)} of warm-up",
    ]


def find_traps(config: Config, rounds: Sequence[RoundSize]) -> list[str]:
    """Return a line for each number of the budget that is known to spoil a run of `rounds`.

    The largest round counts: the last one may be a rest.
    """
    largest, batch, noun = max(rounds), config.train.batch_size, name_examples(config)
    is_auto = config.rounds.prompts_per_round == "auto"
    size = f"rounds.{'max_' if is_auto else ''}prompts_per_round"
    lines = []
    if batch > largest.examples:
        lines.append(
            f"train.batch_size={batch} is more than the {largest.examples} {noun} that a round has "
            f"at most: each of its steps will be smaller; lower it, or raise {size}"
        )
    elif largest.steps < FEW_STEPS:
        wanted = max(largest.examples * config.train.epochs // FEW_STEPS, 1)
        lines.append(
            f"a round has at most {largest.steps} optimizer steps ({largest.examples} {noun}, "
            f"train.batch_size={batch}), fewer where samples {_name_losses(config)}; for "
            f"{FEW_STEPS}, raise {size}, or set --config.train.batch_size={wanted}"
        )
    steps, warmup = sum(one.steps for one in rounds), config.optimizer.warmup_steps
    if warmup >= steps:
        lines.append(
            f"optimizer.warmup_steps={warmup}, but the run has at most {steps} steps: only the "
            "last of them reaches the learning rate; lower it, or set "
            "--config.optimizer.warmup_steps=-1 for optimizer.warmup_fraction"
            f"={config.optimizer.warmup_fraction:g} of the steps"
        )
    return lines


def describe_rest(
    config: Config, done: Sequence[RoundDone], left: Sequence[RoundSize], total_steps: int
) -> str:
    """Return a line on what is left of a run, by what its finished rounds have used.

    The time of the first round, which compiles most, counts only while there is no other.

    Args:
      done: the finished rounds, without round 0.
      left: the rounds to come.
      total_steps: the optimizer steps that the schedule is laid out for.

    Returns:
      The line; "" if no round is done or none is left.
    """
    prompts, noun = sum(one.prompts for one in done), name_examples(config)
    if not left or not prompts:
        return ""
    share = sum(one.examples for one in done) / prompts
    coming = [round(one.prompts * share) for one in left]
    steps = sum(one.steps for one in done) + sum(
        count_steps(count, batch_size=config.train.batch_size, epochs=config.train.epochs)
        for count in coming
        if count
    )
    parts = [
        f"{len(left)} {_plural('round', len(left))} left",
        f"{share:.2f} {noun} a prompt so far, so about {steps:,} steps in all",
    ]
    follows_steps = config.optimizer.schedule != "constant" and not decays_by_budget(config)
    if follows_steps and steps < total_steps:
        last = float(make_schedule(config.optimizer, total_steps)(steps))
        parts.append(
            f"{total_steps:,} in the schedule, so the learning rate ends at {last:.2g} of "
            f"{config.optimizer.learning_rate:g}"
        )
    paces = [one.seconds / one.prompts for one in done if one.seconds]
    if paces:
        pace = statistics.fmean(paces[1:] or paces)
        parts.append(f"about {show_seconds(pace * sum(one.prompts for one in left))}")
    return "; ".join(parts)


def name_examples(config: Config) -> str:
    """Return what the examples of the config's loss are called, such as "pairs"."""
    return ITEM_KINDS[get_loss(config.loss).items].noun


def show_seconds(seconds: float) -> str:
    """Return a time for people: "42 s", "3 min 20 s", "5 h 10 min".

    >>> show_seconds(200.0), show_seconds(18_630.0)
    ('3 min 20 s', '5 h 10 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _name_losses(config: Config) -> str:
    """Say which samples give no example: groups of ties are examples, though they teach nothing."""
    pairs = FEEDBACK_TYPES[config.feedback.type].pairs
    return "tie or have no reward" if pairs else "have no reward"


def _describe_auto(config: Config) -> str:
    """Say that the sizes of rounds are an expectation, where they are."""
    rounds = config.rounds
    if rounds.prompts_per_round != "auto":
        return ""
    low, high = rounds.min_prompts_per_round, rounds.max_prompts_per_round
    return f" (expected; rounds.prompts_per_round=auto chooses {low} to {high})"


def _show_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
