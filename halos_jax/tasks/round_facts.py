"""What an online run decides on its way, in words: its round sizes, its guard, what it exports."""

from halos_jax.config import Config
from halos_jax.rewards.held_out import has_fixed_mean
from halos_jax.rounds.outcome.decisions import keeps_best


def describe_sizes(config: Config) -> str:
    """Say how many prompts a round gets, and by whose choice."""
    rounds, feedback = config.rounds, config.feedback
    size = f"{rounds.prompts_per_round} prompts each"
    if rounds.prompts_per_round == "auto":
        low, high = rounds.min_prompts_per_round, rounds.max_prompts_per_round
        size = f"{low} to {high} prompts each, by rounds.prompts_per_round=auto"
    if not feedback.min_examples:
        return size
    return (
        f"{size}; refilled with further prompts, up to {feedback.max_prompts_factor:g} times as "
        f"many, below feedback.min_examples={feedback.min_examples}"
    )


_ACTIONS = {"warn": "warns", "stop": "ends the run", "retry": "goes back, with a lower rate"}


def describe_guard(config: Config) -> str:
    """Say what the guard does, and at which bounds."""
    guard, evaluated = config.guard, bool(config.data.held_out)
    bounds = {
        "the held-out reward falls": guard.fall and evaluated and not has_fixed_mean(config.reward),
        f"the score by {guard.scorer} falls": bool(guard.scorer) and evaluated,
        f"the KL from SFT exceeds {guard.max_kl:g} nats": guard.max_kl > 0,
        f"the margin of fresh pairs is below {guard.min_margin}": guard.min_margin != "off",
        f"more than {guard.max_truncated:.0%} of the samples are cut": guard.max_truncated < 1,
        f"the length changes by more than {guard.max_length_change:.0%}": guard.max_length_change
        > 0,
    }
    set_ones = [text for text, is_set in bounds.items() if is_set]
    if not set_ones:
        return "no bound is set or can be measured"
    times = f", {guard.patience} rounds in a row" if guard.patience > 1 else ""
    most = f", at most {guard.max_retries} times" if guard.action == "retry" else ""
    return f"{_ACTIONS[guard.action]} where {', or '.join(set_ones)}{times}{most}"


def describe_final(config: Config) -> str:
    """Say which policy final/ will hold."""
    keep = config.rounds.keep_best
    keeps = keeps_best(config, is_evaluated=bool(config.data.held_out))
    which = "the round with the highest held-out reward" if keeps else "the last round"
    return f"the policy of {which} (rounds.keep_best={keep})"
