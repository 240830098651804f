"""The prompts of an online run: to sample from, in order; held out; and those of the test set."""

from collections.abc import Callable
from typing import NamedTuple

from halos_jax.config import Config
from halos_jax.data import datasets
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.selection import Selection, select_eval, select_test
from halos_jax.rewards.function_scorer import check_records
from halos_jax.rewards.held_out import check_held_out, check_means
from halos_jax.rounds import cuts
from halos_jax.rounds.cuts import Limited
from halos_jax.rounds.order import Order, warn_of_trained
from halos_jax.types import Prompt


class RunPrompts(NamedTuple):
    """The prompts of a run; no prompt is in two of these lists.

    Attributes:
      train: those of `data.train` in the order of the run's first pass over them.
      held_out: those on which every round is watched.
      test: those on which the first and the final policy are scored.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    test: list[Prompt]

    def cut(self, start: int, stop: int, config: Config) -> "RunPrompts":
        """Return those that a run samples from if it has `[start, stop)` of all of its passes."""
        has_all = stop > len(self.train) and config.rounds.passes > 1
        return self if has_all else self._replace(train=self.train[start:stop])


def load_prompts(config: Config, renderer: Renderer, needed: int, order: Order) -> RunPrompts:
    """Load the prompts of a run, and check that its templates and rewards can work on them.

    Args:
      renderer: the policy's; its chat template must accept every prompt.
      order: the order of the run, and what is held out of it.
      needed: how many prompts, from the first on, to render; the run uses no more.

    Raises:
      RecordError: for a bad record, or a prompt that the chat template refuses.
      RewardError: for a prompt whose record lacks what a reward needs.
      ConfigError: if a prompt is in two lists, or as `check_means`.
    """
    data = config.data
    datasets.warn_of_benchmarks(data.train)
    candidates = order.prompts
    if data.skip_bad:
        candidates = check_records(config.reward, candidates, skip=True)
    train = keep_shown(candidates, renderer, skip=data.skip_bad, count=needed)
    held_out = keep_usable(order.held_out, config, renderer)
    if data.eval:
        held_out = load_usable(data.eval, select_eval, config, renderer)
    test = load_usable(data.test, select_test, config, renderer)
    found = RunPrompts(train, held_out, test)
    check_prompts(config, found)
    warn_of_trained(order, [*held_out, *test])
    check_means(config, is_watched=bool(held_out))
    return found


def load_usable(
    source: str, select: Callable[..., Selection], config: Config, renderer: Renderer
) -> list[Prompt]:
    """Load held-out prompts; none if `source` is empty. See `keep_usable`."""
    if not source:
        return []
    prompts = datasets.load_prompts(source, select(config.data))
    return keep_usable(prompts, config, renderer)


def keep_usable(prompts: list[Prompt], config: Config, renderer: Renderer) -> list[Prompt]:
    """Return the held-out prompts that rewards, scorers and the chat template can work on.

    The others are an error, unless `data.skip_bad` leaves them out.
    """
    if not prompts:
        return []
    if config.data.skip_bad:
        prompts = check_held_out(config, prompts, skip=True)
    return keep_shown(prompts, renderer, skip=config.data.skip_bad)


def check_prompts(config: Config, prompts: RunPrompts) -> None:
    """Check that no prompt is in two lists, and that the records have what the rewards need.

    Raises:
      ConfigError, RewardError: as `load_prompts`.
    """
    train, held_out, test = prompts
    datasets.refuse_overlap(train, held_out)
    datasets.refuse_overlap(train, test, field="data.test")
    datasets.refuse_overlap(held_out, test, field="data.test", known=name_held_out(config))
    check_records(config.reward, train)
    check_held_out(config, [*held_out, *test])


def check_lengths(sampler: Limited, config: Config, prompts: RunPrompts) -> None:
    """Render the prompts as the sampler will, and log how many are cut; see `cuts`."""
    data, (train, held_out, test) = config.data, prompts
    sources = [(data.train, train), (data.eval or "data.holdout", held_out)]
    cuts.check_prompts(sampler, *sources, *([(data.test, test)] if data.test else []))


def name_held_out(config: Config) -> str:
    """Return the field that holds prompts out: data.holdout or data.eval."""
    return "data.holdout" if config.data.holdout and not config.data.eval else "data.eval"
