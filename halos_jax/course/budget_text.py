"""What an online run will use, in a few lines: rounds, samples, examples, steps, tokens, time."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS
from halos_jax.console.stages import show_count, show_seconds
from halos_jax.losses import get_loss, needs_exact
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


def describe_budget(config: Config, rounds: Sequence[RoundSize], in_pass: int = 0) -> list[str]:
    """Return lines that say what a run of `rounds`, one or more, will use at most.

    A pass has `in_pass` prompts; 0: that is not known.
    """
    sampling, optimizer, noun = config.sampling, config.optimizer, name_examples(config)
    prompts, examples, steps = (sum(column) for column in zip(*rounds, strict=True))
    samples = prompts * sampling.num_samples_per_prompt
    warmup = count_warmup(optimizer, steps)
    sizes = [
        _show_range([one[column] for one in rounds], nouns)
        for column, nouns in enumerate(("prompts", noun, "optimizer steps"))
    ]
    further = " without further prompts" if config.feedback.min_examples else ""
    by_prompts = ", over the prompts" if decays_by_budget(config) else ""
    return [
        f"budget: {show_count(len(rounds), 'rounds')} of {sizes[0]}, {prompts:,} in all"
        f"{_describe_sizes(config, prompts, in_pass)}; "
        f"{show_count(sampling.num_samples_per_prompt, 'samples')} a prompt, {samples:,} in all, "
        f"of at most {show_count(sampling.max_tokens, 'tokens')}, "
        f"{samples * sampling.max_tokens:,} in all",
        f"budget: at most {sizes[1]} and {sizes[2]} a round{further}, "
        f"{show_count(examples, noun)} and {show_count(steps, 'steps')} in all"
        f"{_name_losses(config, '; ')}",
        f"budget: learning rate {optimizer.learning_rate:g} ({optimizer.schedule}{by_prompts}) "
        f"after {show_count(warmup, 'steps')} of warm-up",
        *_describe_refill(config),
        *_describe_replay(config),
    ]


def find_traps(config: Config, rounds: Sequence[RoundSize]) -> list[str]:
    """Return a line for each number that is known to spoil a run of `rounds`.

    The largest round counts: the last one may be a rest.
    """
    largest, batch, noun = max(rounds), config.train.batch_size, name_examples(config)
    is_auto = config.rounds.prompts_per_round == "auto"
    size = f"rounds.{'max_' if is_auto else ''}prompts_per_round"
    lines = []
    if batch > largest.examples:
        lines.append(
            f"train.batch_size={batch} is more than the {show_count(largest.examples, noun)} that "
            "a round has at most: each of its steps will be smaller; lower it, or raise "
            f"{size}"
        )
    elif largest.steps < FEW_STEPS:
        wanted = max(largest.examples * config.train.epochs // FEW_STEPS, 1)
        other = f", or set --config.train.batch_size={wanted}" if wanted < batch else ""
        lines.append(
            f"a round has at most {show_count(largest.steps, 'optimizer steps')} "
            f"({show_count(largest.examples, noun)}, train.batch_size={batch})"
            f"{_name_losses(config, ', ')}; for {FEW_STEPS}, raise {size}{other}"
        )
    steps, warmup = sum(one.steps for one in rounds), config.optimizer.warmup_steps
    if warmup >= steps:
        lines.append(
            f"optimizer.warmup_steps={warmup}, but the run has at most "
            f"{show_count(steps, 'steps')}: only the last of them reaches the learning rate; lower "
            "it, or set --config.optimizer.warmup_steps=-1 for optimizer.warmup_fraction"
            f"={config.optimizer.warmup_fraction:g} of the steps"
        )
    if needs_exact(config) and config.sampling.exact_ratios is False:
        lines.append(_describe_inexact(config))
    return lines


def _describe_inexact(config: Config) -> str:
    sampling = config.sampling
    return (
        f"sampling.exact_ratios=False: the ratios of loss {config.loss['name']!r} are those of "
        "policies at temperature 1 over all tokens, but tokens are drawn at "
        f"sampling.temperature={sampling.temperature:g}, top_p={sampling.top_p:g}, "
        f"top_k={sampling.top_k}: it does not train on what it samples; a new run is exact with "
        "--config.sampling.exact_ratios=auto, or with temperature=1, top_p=1 and top_k=0"
    )


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
        f"{show_count(len(left), 'rounds')} left",
        f"{share:.2f} {noun} a prompt so far, so about {show_count(steps, 'steps')} in all",
    ]
    follows_steps = config.optimizer.schedule != "constant" and not decays_by_budget(config)
    if follows_steps and steps < total_steps:
        last = float(make_schedule(config.optimizer, total_steps)(steps))
        parts.append(
            f"{total_steps:,} in the schedule, so the learning rate ends at {last:.2g} of "
            f"{config.optimizer.learning_rate:g}"
        )
    pace = find_pace(done)
    if pace is not None:
        parts.append(f"about {show_seconds(pace * sum(one.prompts for one in left))}")
    return "; ".join(parts)


def find_pace(done: Sequence[RoundDone]) -> float | None:
    """Return the seconds that finished rounds have taken a prompt; None where none is known.

    The first round, which compiles most, counts only while there is no other.
    """
    paces = [one.seconds / one.prompts for one in done if one.seconds and one.prompts]
    return statistics.fmean(paces[1:] or paces) if paces else None


def name_examples(config: Config) -> str:
    """Return what the examples of the config's loss are called, such as "pairs"."""
    return ITEM_KINDS[get_loss(config.loss).items].noun


def _name_losses(config: Config, mark: str) -> str:
    """Say which samples give no example: groups of ties are examples, though they teach nothing.

    The text begins with `mark`; it is empty where every sample gives one.
    """
    spec = FEEDBACK_TYPES[config.feedback.type]
    if not spec.scored:
        return ""
    lost = "tie or have no reward" if spec.pairs else "have no reward"
    return f"{mark}fewer where samples {lost}"


def _describe_sizes(config: Config, prompts: int, in_pass: int) -> str:
    """Say how often a run has each of its prompts where that is not once, where it has fewer than
    it was to use, and where its sizes are expected."""
    rounds, notes = config.rounds, list[str]()
    if rounds.passes > 1 and in_pass:
        notes.append(f"{prompts / in_pass:.3g} passes over {show_count(in_pass, 'prompts')}")
    elif rounds.passes > 1:
        notes.append(f"in at most {rounds.passes} passes over the data's")
    low, high = rounds.min_prompts_per_round, rounds.max_prompts_per_round
    if prompts < rounds.total_prompts:
        notes.append(f"there are no more for rounds.total_prompts={rounds.total_prompts}")
    if rounds.prompts_per_round == "auto" and prompts < low:
        notes.append(f"fewer than rounds.min_prompts_per_round={low}")
    elif rounds.prompts_per_round == "auto":
        notes.append(f"expected; rounds.prompts_per_round=auto chooses {low} to {high}")
    return f" ({'; '.join(notes)})" if notes else ""


def _describe_refill(config: Config) -> list[str]:
    """Say in a line that a round may get further prompts, where it may."""
    feedback = config.feedback
    if not feedback.min_examples:
        return []
    return [
        "budget: a round that has fewer examples than "
        f"feedback.min_examples={feedback.min_examples} gets further prompts, up to "
        f"{feedback.max_prompts_factor:g} times its share in all (feedback.max_prompts_factor); "
        "fewer are left for later rounds"
    ]


def _describe_replay(config: Config) -> list[str]:
    """Say in a line what share of the examples is of earlier rounds, where there is one."""
    share = config.feedback.replay
    if not share:
        return []
    return [
        f"budget: up to {share:.3g} of the {name_examples(config)} of each round but the first are "
        "those of earlier rounds once more (feedback.replay)"
    ]


def _show_range(numbers: Sequence[int], nouns: str) -> str:
    low, high = min(numbers), max(numbers)
    return ("" if low == high else f"{low:,} to ") + show_count(high, nouns)
