"""Advice after a round: what its signs say of the learning rate, the rounds and the samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from halos_jax.config import Config
from halos_jax.config.kinds import FEEDBACK_TYPES
from halos_jax.console.stages import show_count
from halos_jax.course.budget_text import FEW_STEPS, name_examples
from halos_jax.course.falls import compare_means
from halos_jax.integers import divide_up, round_up
from halos_jax.signs.intervals import Estimate


class Threshold(NamedTuple):
    """A number that a sign is compared with, and where it comes from."""

    value: float
    source: str


# Measured with Qwen2.5-Coder-0.5B-Instruct on GSM8K (DPO, beta 0.1, 4 samples of at most 320 tokens
# at temperature 0.8, about 30 steps of 32 pairs), one H100, 2026-11-25: right answers in per cent.
THRESHOLDS: Mapping[str, Threshold] = {
    "low_margin": Threshold(
        -0.05,
        "-0.1 to -0.3 in rounds at 5e-6 in which right answers fell; -0.03 where they rose, but "
        "-0.15 in rounds of DAPO that went on to rise by 10 points: so not while they rise",
    ),
    "kl_growth": Threshold(
        1.5, "at 5e-6, 16 rounds: 8.5 nats at the best round, 18 at the end, answers 24.7 -> 21.9"
    ),
    "kl_rise": Threshold(
        3.0, "at 2e-6 the KL ended at 2.5 to 4.5 nats in all, and right answers rose throughout"
    ),
    "kl_rounds": Threshold(3, "single evaluations of 400 x 4 samples differ by 1.3 points"),
    "small_kl": Threshold(
        0.3, "0.8 nats after 30 steps at 1e-6, which raised right answers from 17.5 to 21.1"
    ),
    "small_kl_steps": Threshold(24, "warm-up is over, and 30 steps were enough to see a gain"),
    "small_ess": Threshold(
        0.5,
        "by definition: the round's samples tell as much of the new policy as half of them; with "
        "DAPO answers rose from 15 to 35 at 0.01 to 0.4: so not while they rise",
    ),
    "stale_kl": Threshold(
        0.35, "that share for normal log-ratios: ESS = exp(-variance), KL = variance / 2"
    ),
    "many_ties": Threshold(
        0.5, "more than half of what is sampled teaches nothing; 0.6 in the runs above"
    ),
    "many_cut": Threshold(0.2, "a third of the samples was cut in the runs above; 24.7 at best"),
    "few_steps": Threshold(2, "rounds of 2 steps did as well as any: 16.4 to 17.4 -> 22.7 to 23.3"),
}


class RoundSigns(NamedTuple):
    """What is known of a finished round.

    Attributes:
      prompts: how many it has used.
      rate: `optimizer.learning_rate` as the config has it.
      metrics: those of its manifest.
      factor: what retries of the guard before it multiply `rate` by.
      back_to: the round that the guard went back to after it, with a lower rate; None: it did not.
    """

    round: int
    prompts: int
    rate: float
    metrics: Mapping[str, Any]
    factor: float = 1.0
    back_to: int | None = None

    @property
    def is_discarded(self) -> bool:
        """Whether the next round does not start from the policy of this one."""
        return self.back_to is not None and self.back_to < self.round


class Hint(NamedTuple):
    """A piece of advice: what it is about, the settings that would suit, the sentence."""

    about: str
    suits: str
    text: str


def list_new_hints(config: Config, done: Sequence[RoundSigns]) -> list[list[Hint]]:
    """Return, for each of the rounds `done`, the hints after it that were not given before.

    A hint is given again only if it advises something else than when it was last given.

    Args:
      done: all rounds from round 0 on, without gaps.
    """
    said: dict[str, str] = {}
    new: list[list[Hint]] = [[] for _ in done[:1]]
    for count in range(2, len(done) + 1):
        found = list_hints(config, done[:count])
        new.append([hint for hint in found if said.get(hint.about) != hint.suits])
        said |= {hint.about: hint.suits for hint in new[-1]}
    return new


def list_hints(config: Config, done: Sequence[RoundSigns]) -> list[Hint]:
    """Return all that the signs of the rounds `done` say after the last one; often nothing."""
    hints = [read(config, done) for read in _READERS]
    return [hint for hint in hints if hint is not None]


# --------------------------------------------------------------------------- the learning rate


def _read_rate(config: Config, done: Sequence[RoundSigns]) -> Hint | None:
    last = done[-1]
    if last.back_to is not None:
        return None  # the guard has lowered it
    excess, low = find_excess(done), _find_standstill(done)
    if excess:
        return _advise_rate("rate", last, 0.5, f"the learning rate is too high: {excess}")
    if low:
        return _advise_rate("rate", last, 2, f"the learning rate may be too low: {low}")
    return None


def find_excess(done: Sequence[RoundSigns]) -> str:
    """Say by which signs the learning rate is too high; "" if there is none.

    Rounds whose policies the guard discarded do not count.
    """
    kept = list[RoundSigns]()
    for one in done:
        back_to = one.round if one.back_to is None else one.back_to
        kept = [other for other in (*kept, one) if other.round <= back_to]
    if done[-1].is_discarded:
        return ""
    causes = [read(kept) for read in (_find_fall, _find_low_margin, _find_kl_without_gain)]
    return "; ".join(cause for cause in causes if cause)


def _advise_rate(about: str, last: RoundSigns, by: float, what: str) -> Hint:
    """Advise the config's learning rate times `by`, which a resume multiplies by the factor."""
    rate = last.rate * by
    suits, where = f"optimizer.learning_rate={rate:.3g}", "here (a resume takes it) or next"
    if last.factor != 1:
        where = (
            f"here (a resume takes it, times {last.factor:.3g} for the guard's retries), or "
            f"{rate * last.factor:.3g} in the next run"
        )
    return Hint(about, suits, f"{what}; try --config.{suits}, {where}")


def _find_fall(done: Sequence[RoundSigns]) -> str:
    """Say that the held-out reward has fallen below its highest, beyond the interval."""
    now, before = _read_estimate(done[-1], "reward_eval"), _list_estimates(done[:-1], "reward_eval")
    if now is None or not before:
        return ""
    round, best = max(before, key=lambda one: one[1].value)
    if compare_means(now, best, chosen_from=len(before)).high >= 0:
        return ""
    return (
        f"the held-out reward fell from {best.value:.3f} after round {round} to {now.value:.3f}, "
        "which is beyond its interval"
    )


def _find_low_margin(done: Sequence[RoundSigns]) -> str:
    """Say that new pairs had a negative margin, beyond its interval, before they were learnt.

    While the held-out reward rises, a low margin is no sign that the rate is too high.
    """
    margin = _read_estimate(done[-1], "fresh_margin")
    if margin is None or margin.high >= 0 or margin.value > THRESHOLDS["low_margin"].value:
        return ""
    if _is_rising(done):
        return ""
    return (
        "on the round's new pairs, before it was trained on them, the policy preferred the worse "
        f"answers more than the reference does (margin {margin.value:.3f}, at most "
        f"{margin.high:z.3f})"
    )


def _is_rising(done: Sequence[RoundSigns]) -> bool:
    """Return whether the newest held-out reward is higher than every one before."""
    *before, now = [one.value for _, one in _list_estimates(done, "reward_eval")] or [0.0]
    return bool(before) and now > max(before)


def _find_kl_without_gain(done: Sequence[RoundSigns]) -> str:
    """Say that the KL has grown since the round with the highest held-out reward.

    The samples of a round are of the policy of the round before.
    """
    rewards = _list_estimates(done, "reward_eval")
    if not rewards:
        return ""
    best = max(rewards, key=lambda one: one[1].value)[0]
    later = [one for one in done if one.round > best]
    if len(later) < THRESHOLDS["kl_rounds"].value or rewards[-1][0] == best:
        return ""
    before, after = _read_kl(later[0]), _read_kl(later[-1])
    if before is None or after is None:
        return ""
    if after < THRESHOLDS["kl_growth"].value * before:
        return ""
    if after - before < THRESHOLDS["kl_rise"].value:
        return ""
    return (
        f"the KL from the SFT policy grew from {before:.1f} to {after:.1f} nats a response since "
        f"round {best}, whose held-out reward is still the highest"
    )


def _find_standstill(done: Sequence[RoundSigns]) -> str:
    """Say that the policy hardly moves, although it has taken many steps.

    After a retry of the guard, nothing is said: a higher rate is what it went back from.
    """
    if any(one.back_to is not None for one in done):
        return ""
    now, kl = done[-1], _read_kl(done[-1])
    steps = done[-2].metrics.get("steps_done", 0)  # of the policy that the KL was measured with
    if kl is None or kl >= THRESHOLDS["small_kl"].value:
        return ""
    if steps < THRESHOLDS["small_kl_steps"].value:
        return ""
    rewards = _list_estimates(done, "reward_eval")
    if len(rewards) > 1 and compare_means(rewards[-1][1], rewards[0][1], chosen_from=1).low > 0:
        return ""
    margin = now.metrics.get("fresh_margin", 0.0)
    return (
        f"after {steps} steps the policy is {kl:z.2f} nats a response from the SFT policy, the "
        f"margin on new pairs is {margin:z.3f}, and the held-out reward has not risen beyond its "
        "interval"
    )


# --------------------------------------------------------------------------- rounds and samples


def _read_staleness(config: Config, done: Sequence[RoundSigns]) -> Hint | None:
    """Advise shorter rounds where the policy leaves the samples that it learns from behind.

    While the held-out reward rises, they are no harm. A lower rate where they have few steps.
    """
    now, stale, size = done[-1], find_staleness(done[-1]), config.rounds.prompts_per_round
    least = config.rounds.min_prompts_per_round if size == "auto" else 1
    if not stale or (size == "auto" and now.prompts > least) or _is_rising(done):
        return None
    steps, is_short = _count_steps(done), now.prompts <= least
    if is_short or 0 < steps < 2 * FEW_STEPS:
        if now.back_to is not None or find_excess(done):
            return None  # a lower rate is there already, or advised
        least_size = f"as short as they may be ({show_count(least, 'prompts')})"
        what = least_size if is_short else f"short ({show_count(steps, 'optimizer steps')})"
        return _advise_rate("staleness", now, 0.5, f"rounds are {what}, but {stale}")
    prompts = now.prompts
    if config.feedback.min_examples and size != "auto":
        prompts = min(prompts, max(size, 2))  # the round may have got further ones
    wanted, shard = prompts // 2, config.sampling.shard_prompts
    wanted = wanted // shard * shard or wanted
    suits = f"rounds.prompts_per_round={wanted}"
    text = f"rounds are long: {stale}; try --config.{suits} in the next run, or a lower rate"
    return Hint("staleness", suits, text)


def find_staleness(one: RoundSigns) -> str:
    """Say that the policy has left the samples of a round behind; "" if it has not.

    A policy that the guard discarded says nothing.
    """
    if one.is_discarded:
        return ""
    share, kl = read_staleness(one)
    is_small = share is not None and share < THRESHOLDS["small_ess"].value
    if not is_small and (kl is None or kl <= THRESHOLDS["stale_kl"].value):
        return ""
    return (
        "at the end of the round the policy had left the one that sampled it behind "
        f"({describe_staleness(share, kl)})"
    )


def read_staleness(one: RoundSigns) -> tuple[float | None, float | None]:
    """Return the effective share of a round's samples, and the KL; None where it is not known."""
    return one.metrics.get("stale_ess"), _read_first(one, "kl_stale", "kl_sampled_stale")


def describe_staleness(share: float | None, kl: float | None) -> str:
    """Return what is known of the distance between the policy and a round's samples."""
    parts = [
        "" if kl is None else f"KL {kl:z.2f} nats a response",
        "" if share is None else f"effective share of its samples {share:.2f}",
    ]
    return ", ".join(filter(None, parts))


def _read_ties(config: Config, done: Sequence[RoundSigns]) -> Hint | None:
    """Advise more samples a prompt where most prompts teach nothing."""
    feedback, share = config.feedback, done[-1].metrics.get("tied_share")
    spec = FEEDBACK_TYPES[feedback.type]
    compares = spec.compares and config.loss["name"] not in spec.single_losses
    if share is None or share <= THRESHOLDS["many_ties"].value:
        return None
    if not compares and feedback.scope != "prompt":
        return None
    samples = 2 * config.sampling.num_samples_per_prompt
    suits = f"sampling.num_samples_per_prompt={samples}"
    others = "a higher sampling.temperature, or feedback.min_examples (further prompts for a round)"
    if feedback.min_examples:
        others = "or a higher sampling.temperature,"
    text = (
        f"{share:.0%} of the prompts have samples of equal reward and teach nothing; try "
        f"--config.{suits}, {others} in the next run"
    )
    return Hint("ties", suits, text)


def _read_cuts(config: Config, done: Sequence[RoundSigns]) -> Hint | None:
    """Advise a higher token limit where it cuts many samples."""
    metrics, sampling = done[-1].metrics, config.sampling
    share = metrics.get("truncated", 0) / max(metrics.get("samples", 0), 1)
    if share <= THRESHOLDS["many_cut"].value:
        return None
    limit = round_up(sampling.max_tokens * 3 // 2, 64)
    suits = f"sampling.max_tokens={limit}"
    length = sampling.max_prompt_length + limit
    if length > config.train.max_length:
        suits += f" --config.train.max_length={length}"
    text = (
        f"{share:.0%} of the samples were cut at sampling.max_tokens={sampling.max_tokens}, before "
        f"they ended; try --config.{suits} in the next run"
    )
    return Hint("cuts", suits, text)


def _read_steps(config: Config, done: Sequence[RoundSigns]) -> Hint | None:
    """Advise larger rounds where one has too few examples for its batch."""
    now, batch = done[-1], config.train.batch_size
    examples = sum(now.metrics.get(f"feedback_{name}", 0) for name in ("pairs", "examples"))
    few = int(THRESHOLDS["few_steps"].value)
    if not examples or not now.prompts or config.rounds.prompts_per_round == "auto":
        return None
    if not 0 < _count_steps(done) < few or find_staleness(now):
        return None  # more steps would leave the samples further behind
    wanted = divide_up(few * batch * now.prompts, examples)
    wanted = round_up(wanted, config.sampling.shard_prompts) if wanted > 1 else wanted
    ways = {
        f"rounds.prompts_per_round={wanted}": wanted <= config.rounds.total_prompts,
        f"train.batch_size={examples // few}": examples // few > 1,
    }
    possible = [way for way, is_possible in ways.items() if is_possible]
    advised = " or ".join(f"--config.{way}" for way in possible)
    text = (
        f"the round's {show_count(examples, name_examples(config))} "
        f"{'was' if examples == 1 else 'were'} a single step of train.batch_size={batch}; for "
        f"{few} steps, try {advised or 'more prompts (rounds.total_prompts)'} in the next run"
    )
    return Hint("steps", (possible or ["rounds.total_prompts"])[0], text)


_READERS: tuple[Callable[[Config, Sequence[RoundSigns]], Hint | None], ...] = (
    _read_rate,
    _read_staleness,
    _read_ties,
    _read_cuts,
    _read_steps,
)


# --------------------------------------------------------------------------- what a round has


def _count_steps(done: Sequence[RoundSigns]) -> int:
    """Return the optimizer steps of the last round; 0 where they are not known."""
    first, last = (int(one.metrics.get("steps_done", 0)) for one in done[-2:])
    return max(last - first, 0)


def _read_kl(one: RoundSigns) -> float | None:
    return _read_first(one, "kl_sft", "kl_sampled")


def _read_first(one: RoundSigns, *names: str) -> float | None:
    """Return the first of these metrics that a round has; None if it has none of them."""
    return next((one.metrics[name] for name in names if name in one.metrics), None)


def _read_estimate(one: RoundSigns, name: str) -> Estimate | None:
    """Return a metric with its interval; None if either is not known."""
    known = [one.metrics[name + end] for end in ("", "/low", "/high") if name + end in one.metrics]
    return Estimate(*known) if len(known) == 3 else None


def _list_estimates(done: Sequence[RoundSigns], name: str) -> list[tuple[int, Estimate]]:
    """Return (round, estimate) of every round that has one."""
    found = [(one.round, _read_estimate(one, name)) for one in done]
    return [(round, estimate) for round, estimate in found if estimate is not None]
