"""Where a reward model's score is read: at the end of its template, or at the end of the answer.

A classifier in transformers reads its score at the last token that is not padding. It is trained
and used on conversations as its chat template writes them, and some templates write a line break
after the end marker of the last turn.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Sequence

from halos_jax.config import Config
from halos_jax.config.rewards import RewardConfig
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.chat.renderer import Renderer
from halos_jax.models.files import hf
from halos_jax.types import FINISH_STOP, Sample, Turn

logger = logging.getLogger(__name__)

# Field in the config.json of a reward model trained by this package: where to read its score.
READ_AT = "halos_jax_read_at"


def load_reward_renderer(reward: RewardConfig) -> Renderer:
    """Load the renderer of the reward model at `reward.path`.

    Its template has options of its own (`reward.chat_template_options`), none of the policy's.
    """
    options = reward.chat_template_options
    return load_renderer(reward.path, "", options, "reward.chat_template_options")


def make_preparer(
    config: Config, policy: Renderer, own: Renderer
) -> Callable[[Sequence[Sample]], list[Sample]]:
    """Return a function that gives samples the tokens that the reward model gets.

    The score is read at the last of them. If the reward model has the policy's tokenizer and
    template, they are the policy's exact tokens followed by the end of the template. Otherwise, or
    if the template would write something else, `own` renders the turns that the policy saw and the
    text of its answer.

    Raises:
      ModelError: if the model's config.json cannot be read.
    """
    settings = hf.read_hf_config(hf.resolve_model(config.reward.path))
    read_at = config.reward.read_at
    if read_at == "auto":
        read_at = settings.get(READ_AT, "template_end")
    # A control token tells the policy how to answer; the reward model must not see it.
    same = own.fingerprint == policy.fingerprint and not config.sampling.prefix
    if read_at == "end_of_turn":
        return lambda samples: (
            list(samples) if same else [_render_answer(one, policy, own, config) for one in samples]
        )
    pad_id = settings.get("pad_token_id")
    _say_where(own, pad_id)

    def prepare(samples: Sequence[Sample]) -> list[Sample]:
        find_turns = functools.cache(functools.partial(_find_turns, policy, own, config))
        render_prompt = functools.cache(lambda turns: own.render_prompt(turns, sys.maxsize))
        whole = [(*find_turns(one.prompt.turns), Turn("assistant", one.output)) for one in samples]
        prepared = []
        for sample, turns, ids in zip(samples, whole, own.render_whole(whole), strict=True):
            plain = same and own.end_ids and own.writes_plainly(turns)
            prompt = sample.prompt_ids if plain else render_prompt(turns[:-1])
            ids = (*prompt, *_close(sample, own)) if plain else ids
            prepared.append(_split(sample, prompt, _strip_padding(ids, pad_id)))
        return prepared

    return prepare


def _say_where(own: Renderer, pad_id: int | None) -> None:
    """Log where the score is read, if that is not at the end marker."""
    (ids,) = own.render_whole([(Turn("user", "x"), Turn("assistant", "x"))])
    shown = [repr(own.tokenizer.decode([token])) for token in ids[-3:]]
    if own.closing:
        logger.info(
            "the reward model is read at the last token of its template, behind %s, as it is by "
            "transformers; at the marker itself it is with --config.reward.read_at=end_of_turn",
            own.end_marker,
        )
    if ids[-1] == pad_id:
        logger.warning(
            "the reward model's padding token is also the last of its template (... %s): as "
            "transformers does, the last token before it is read; where it was trained to be read "
            "at the end marker set --config.reward.read_at=end_of_turn",
            " ".join(shown),
        )


def _find_turns(
    policy: Renderer, own: Renderer, config: Config, turns: tuple[Turn, ...]
) -> tuple[Turn, ...]:
    """Return the turns that the policy saw, as far as they fit into the reward model's length."""
    turns = policy.truncate_turns(turns, config.sampling.max_prompt_length)
    return own.truncate_turns(turns, config.reward.max_length)


def _close(sample: Sample, own: Renderer) -> tuple[int, ...]:
    """Return the answer's own tokens, with its end token replaced by the end of the template."""
    ids = list(sample.response_ids)
    while ids and ids[-1] in own.stop_ids:
        ids.pop()
    return (*ids, *own.end_ids)


def _strip_padding(ids: Sequence[int], pad_id: int | None) -> tuple[int, ...]:
    end = len(ids)
    while pad_id is not None and end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return tuple(ids[:end])


def _split(sample: Sample, prompt: Sequence[int], ids: Sequence[int]) -> Sample:
    """Return the sample with `ids`, split where they cease to agree with those of the prompt."""
    shared = next(
        (at for at, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]),
        len(prompt),
    )
    shared = max(min(shared, len(ids) - 1), 1)  # neither half may be empty
    return dataclasses.replace(
        sample, prompt_ids=tuple(ids[:shared]), response_ids=tuple(ids[shared:])
    )


def _render_answer(sample: Sample, policy: Renderer, own: Renderer, config: Config) -> Sample:
    """Render what the policy saw, the truncated turns, and the answer up to its end marker."""
    turns = policy.truncate_turns(sample.prompt.turns, config.sampling.max_prompt_length)
    prompt_ids = own.render_prompt(turns, config.reward.max_length)
    finished = sample.finish_reason == FINISH_STOP
    response_ids = own.render_response(sample.output, finished=finished)
    return dataclasses.replace(sample, prompt_ids=prompt_ids, response_ids=response_ids)
