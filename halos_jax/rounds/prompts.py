"""The prompts of an online run: those to sample from, in order, and the held-out prompts."""

from halos_jax.config import Config
from halos_jax.data import datasets
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.rewards.function_scorer import check_records
from halos_jax.rounds.order import Order
from halos_jax.types import Prompt


def load_prompts(
    config: Config, renderer: Renderer, needed: int, order: Order
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of `data.train`, in the order of the run, and those of `data.eval`.

    Args:
      renderer: the policy's; its chat template must accept every prompt.
      order: the order of the run.
      needed: how many prompts, from the first on, to render; the run uses no more.

    Raises:
      RecordError: for a bad record, or a prompt that the chat template refuses.
      ConfigError: if a prompt is in both.
    """
    data = config.data
    datasets.warn_of_benchmarks(data.train)
    candidates = order.prompts
    if data.skip_bad:
        candidates = check_records(config.reward, candidates, skip=True)
    prompts = keep_shown(candidates, renderer, skip=data.skip_bad, count=needed)
    held_out: list[Prompt] = []
    if data.eval:
        held_out = datasets.load_prompts(data.eval, datasets.select_eval(data))
        if data.skip_bad:
            held_out = check_records(config.reward, held_out, skip=True)
        held_out = keep_shown(held_out, renderer, skip=data.skip_bad)
        datasets.refuse_overlap(prompts, held_out)
    return prompts, held_out
