"""What one glance at a run must tell: is it learning, drifting, gaming the length; what to do.

Every answer rests on numbers that it shows, and "?" stands where they are not known.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from halos_jax.course.advice import find_excess, list_hints
from halos_jax.course.best import REWARD, RoundRecord, find_highest, read_number
from halos_jax.course.falls import compare_means
from halos_jax.course.verdicts import Verdict, describe_verdict, read_verdict
from halos_jax.report.recorded import Recorded
from halos_jax.report.round_charts import first_known
from halos_jax.rewards.held_out import has_fixed_mean
from halos_jax.signs.intervals import Estimate
from halos_jax.workdir.manifests import Manifest

Level = Literal["good", "watch", "bad", "unknown"]

STEADY = 0.1  # a change of the length by less is no change
LONGER = 0.25  # growth of the length that calls for a look
GOES_WITH = 0.2  # correlation of length and reward that makes longer answers suspect
NEAR_BOUND = 0.8  # share of a bound of the guard from which on it is near


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question about the run, its answer in a few words, and the numbers it rests on."""

    question: str
    level: Level
    answer: str
    detail: str


def answer_all(run: Recorded, *, length_reward: float | None = None) -> list[Answer]:
    """Return the answers for an online run, or for a task that trains.

    Args:
      length_reward: correlation of length and reward among the samples of a held-out prompt, of
        the newest evaluation.
    """
    if not run.rounds:
        return _answer_training(run)
    return [
        _ask_learning(run),
        _ask_drift(run),
        _ask_length(run, length_reward),
        _ask_advice(run),
    ]


# --------------------------------------------------------------------------- an online run


def _ask_learning(run: Recorded) -> Answer:
    question = "Is it learning?"
    known = [one for one in run.rounds if read_number(one, REWARD) is not None]
    if run.config is not None and has_fixed_mean(run.config.reward):
        what = "The reward compares samples of one policy only, so its mean says nothing."
        return Answer(question, "unknown", "Not measured", what)
    if len(known) < 2:
        return Answer(question, "unknown", "Not known yet", _describe_unevaluated(run, known))
    first, last = known[0], known[-1]
    best, _ = find_highest(known, REWARD)
    before, now = _read_estimate(first, REWARD), _read_estimate(last, REWARD)
    wins = _read_estimate(last, "win_rate_eval")
    parts = [
        f"Held-out reward {_show(before)} {_name_start(first)}, {_show(now)} after round "
        f"{last.round}"
    ]
    if best is not None and best.round not in (first.round, last.round):
        parts.append(f"best {_show(_read_estimate(best, REWARD))} after round {best.round}")
    if wins is not None:
        parts.append(f"wins {_show_share(wins)} against SFT")
        low, high = wins.low - 0.5, wins.high - 0.5
    else:
        change = compare_means(_require(now), _require(before), chosen_from=1)
        low, high = change.low, change.high
    detail = "; ".join(parts) + "."
    if low > 0:
        fell = best is not None and best.round != last.round and _has_fallen(known)
        if fell:
            return Answer(question, "watch", "It did, but falls", detail)
        return Answer(question, "good", "Yes", detail)
    if high < 0:
        return Answer(question, "bad", "No: worse than SFT", detail)
    return Answer(question, "watch", "Not beyond noise", detail)


def _describe_unevaluated(run: Recorded, known: Sequence[Manifest]) -> str:
    rewards = [
        f"{value:.3f}"
        for one in run.rounds
        if one.round and (value := read_number(one, "reward_train_mean")) is not None
    ]
    why = "Only the SFT policy is evaluated so far" if known else "There are no held-out prompts"
    if not rewards:
        return f"{why}."
    rest = f" to {rewards[-1]}" if len(rewards) > 1 else ""
    return f"{why}; mean reward of the training samples {rewards[0]}{rest}."


def _name_start(first: Manifest) -> str:
    return f"after round {first.round}" if first.round else "(SFT)"


def _has_fallen(known: Sequence[Manifest]) -> bool:
    """Tell whether the last reward is below its highest, beyond the interval of the difference."""
    best, count = find_highest(known[:-1], REWARD)
    now = _read_estimate(known[-1], REWARD)
    before = None if best is None else _read_estimate(best, REWARD)
    if now is None or before is None:
        return False
    return compare_means(now, before, chosen_from=count).high < 0


def _ask_drift(run: Recorded) -> Answer:
    question = "Is it drifting?"
    kl = first_known(run.rounds, "kl_sft", "kl_sampled")
    moved = [one for one in run.rounds if one.round and read_number(one, kl) is not None]
    if not moved:
        return Answer(question, "unknown", "Not known yet", "No KL from the SFT policy is known.")
    last = moved[-1]
    value, by_token = read_number(last, kl), read_number(last, f"{kl}_per_token")
    what = f"{value:z.2f} nats a response from SFT"
    if by_token is not None:
        what += f" ({by_token:z.4f} a token)"
    detail = f"KL {what}, by the samples of round {last.round}"
    margin = _read_estimate(last, "fresh_margin")
    if margin is not None:
        detail += f"; margin of fresh pairs {margin.value:+z.3f}"
    bound = run.plain.get("guard", {}).get("max_kl") or 0.0
    if bound and value is not None and value > bound:
        return Answer(question, "bad", "Beyond the bound", f"{detail}; guard.max_kl is {bound:g}.")
    signs = run.list_signs()
    excess = find_excess(signs) if len(signs) > 1 else ""
    if excess:
        return Answer(question, "watch", "Yes: see the advice", f"{detail}; {excess}.")
    if bound and value is not None and value > NEAR_BOUND * bound:
        return Answer(question, "watch", "Near the bound", f"{detail}; guard.max_kl is {bound:g}.")
    return Answer(question, "good", "No sign of it", f"{detail}.")


def _ask_length(run: Recorded, goes_with: float | None) -> Answer:
    question = "Is it gaming the length?"
    name = first_known(run.rounds, "response_tokens_eval", "response_tokens_mean")
    known = [one for one in run.rounds if read_number(one, name) is not None]
    if len(known) < 2:
        return Answer(question, "unknown", "Not known yet", "It takes two rounds to tell.")
    before, now = (read_number(one, name) or 0.0 for one in (known[0], known[-1]))
    change = now / before - 1 if before else math.inf
    detail = (
        f"{before:.0f} tokens at first, {now:.0f} after round {known[-1].round} ({change:+z.0%})"
    )
    cut = read_number(known[-1], "truncated_eval")
    if cut is not None:
        detail += f"; {cut:.0%} of the held-out samples cut by the token limit"
    if goes_with is not None:
        detail += f"; correlation of length and reward within a prompt {goes_with:+z.2f}"
    detail += "."
    suspect = goes_with is not None and goes_with > GOES_WITH
    if change > LONGER and suspect:
        return Answer(question, "bad", "Likely: longer scores higher", detail)
    if change > LONGER:
        return Answer(question, "watch", "Answers are longer", detail)
    if change < -LONGER:
        return Answer(question, "watch", "Answers are shorter", detail)
    if abs(change) <= STEADY:
        return Answer(question, "good", "No: the length is steady", detail)
    return Answer(question, "good", "No: little change", detail)


def _ask_advice(run: Recorded) -> Answer:
    question = "What do guard and advice say?"
    verdicts = [one for one in run.rounds if read_verdict(one).action != "none"]
    signs = run.list_signs()
    hints = list_hints(run.config, signs) if run.config is not None and len(signs) > 1 else []
    if verdicts:
        last = verdicts[-1]
        verdict = read_verdict(last)
        said = _shorten_verdict(verdict, last.round)
        is_now = last.round == run.rounds[-1].round
        level: Level = "bad" if verdict.action == "stop" or is_now else "watch"
        text = describe_verdict(verdict, last.round)
        return Answer(question, level, said, f"{text[:1].upper()}{text[1:]}.")
    if hints:
        said = f"{len(hints)} pieces of advice" if len(hints) > 1 else "A piece of advice"
        rest = f" {len(hints) - 1} more below." if len(hints) > 1 else ""
        return Answer(question, "watch", said, f"{hints[0].text}.{rest}")
    if run.config is None or len(run.rounds) < 2:
        return Answer(question, "unknown", "Nothing yet", "Advice comes after the first round.")
    return Answer(question, "good", "Nothing to change", "No bound is broken, no sign stands out.")


def _shorten_verdict(verdict: Verdict, round: int) -> str:
    if verdict.action == "retry":
        return f"Went back after round {round}"
    if verdict.action == "stop":
        return f"Stopped after round {round}"
    return f"A bound was broken in round {round}"


# --------------------------------------------------------------------------- a task that trains


def _answer_training(run: Recorded) -> list[Answer]:
    held_out = _list_values(run, "loss/eval")
    trained = _list_values(run, "loss/train")
    found = []
    if held_out:
        found.append(_compare_losses("Is it learning?", "Held-out loss", held_out))
    elif trained:
        tenth = max(len(trained) // 10, 1)
        ends = [sum(part) / len(part) for part in (trained[:tenth], trained[-tenth:])]
        found.append(_compare_losses("Is it learning?", "Training loss", ends))
    accuracies = _list_values(run, "rewards_eval/accuracies")
    if accuracies:
        level: Level = "good" if accuracies[-1] > max(0.5, accuracies[0]) else "watch"
        detail = f"Held-out accuracy {accuracies[0]:.3f} at first, {accuracies[-1]:.3f} at the end."
        found.append(Answer("Does it tell good from bad?", level, f"{accuracies[-1]:.1%}", detail))
    if len(held_out) > 2:
        least = min(held_out)
        is_over = held_out[-1] > least * 1.02 if least > 0 else held_out[-1] > least
        detail = f"Held-out loss {held_out[-1]:.4f} at the end, {least:.4f} at its lowest."
        said = "Yes: it rises again" if is_over else "No sign of it"
        found.append(Answer("Does it overfit?", "watch" if is_over else "good", said, detail))
    return found


def _compare_losses(question: str, what: str, values: Sequence[float]) -> Answer:
    first, last = values[0], values[-1]
    detail = f"{what} {first:.4f} at first, {last:.4f} now."
    if len(values) < 2:
        return Answer(question, "unknown", "Not known yet", detail)
    return Answer(question, *(("good", "Yes") if last < first else ("bad", "No")), detail)


def _list_values(run: Recorded, name: str) -> list[float]:
    return [one[name] for one in run.metrics if name in one and math.isfinite(one[name])]


# --------------------------------------------------------------------------- numbers


def _read_estimate(one: RoundRecord, name: str) -> Estimate | None:
    value = read_number(one, name)
    if value is None:
        return None
    low, high = read_number(one, f"{name}/low"), read_number(one, f"{name}/high")
    if low is None or high is None:
        return Estimate(value, -math.inf, math.inf)
    return Estimate(value, low, high)


def _require(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise ValueError("an estimate that was found before is missing")
    return estimate


def _show(estimate: Estimate | None) -> str:
    if estimate is None:
        return "?"
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.3f}" + (f" ±{half:.3f}" if math.isfinite(half) else "")


def _show_share(estimate: Estimate) -> str:
    ends = f" [{estimate.low:.0%}, {estimate.high:.0%}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:.0%}{ends}"
