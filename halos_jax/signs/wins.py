"""Win rates: how often samples of one policy beat those of another on the same prompts."""

from collections.abc import Sequence

from halos_jax.signs.intervals import Estimate, estimate_clustered_share


def estimate_wins(
    scores: Sequence[float | None], others: Sequence[float | None], prompts: Sequence[str]
) -> Estimate | None:
    """Return the share of pairs in which a score beats the other; a tie counts one half.

    Args:
      scores, others: f64[n], of sample i of a prompt under either policy; pairs that lack a score
        are left out.
      prompts: the prompt of each pair; the interval is from the spread between prompts.

    Returns:
      The estimate; None if no pair is left.
    """
    wins, of = [], []
    for score, other, prompt in zip(scores, others, prompts, strict=True):
        if score is not None and other is not None:
            wins.append(1.0 if score > other else 0.5 if score == other else 0.0)
            of.append(prompt)
    return estimate_clustered_share(wins, of) if wins else None
