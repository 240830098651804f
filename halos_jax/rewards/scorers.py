"""Scorers: from samples to rewards, by a reward model, a Python function or a judge."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.config import Config, ConfigError
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.config.tasks import TASKS, load
from halos_jax.console.bars import make_progress
from halos_jax.console.watchdog import sign_of_life
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.lengths import Tally, report_positions
from halos_jax.data.tokenize import make_group_items
from halos_jax.devices import explain_memory
from halos_jax.integers import divide_up
from halos_jax.models import decoder
from halos_jax.models.files import hf, vocab
from halos_jax.models.hf.families import ModelError
from halos_jax.models.hf.positions import refuse_longer
from halos_jax.models.spec import DecoderConfig
from halos_jax.once import say_once
from halos_jax.packing.batches import build_batch, plan_batches, split_scores
from halos_jax.packing.layout import Layout, LayoutMemory
from halos_jax.rewards.function_scorer import make_function_scorer
from halos_jax.rewards.judge.scorer import make_judge_scorer, probe_judge
from halos_jax.rewards.labels import RewardError, Scorer
from halos_jax.rewards.parts import make_sum_scorer, part_to_reward
from halos_jax.rewards.read_at import load_reward_renderer, make_preparer
from halos_jax.types import FINISH_STOP, Batch, Params, Sample

logger = logging.getLogger(__name__)

_LAST_SENTENCE = re.compile(r".*[.!?]", re.DOTALL)


def make_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    check: Callable[[], None] = lambda: None,
    layouts: LayoutMemory | None = None,
    name: str = "reward",
) -> Scorer:
    """Return the scorer of `config.reward`, for `labels.label_samples`.

    Args:
      renderer: the policy's; None if it is unknown, which is an error only if a reward needs it.
      check: called by scorers now and then; an error that it raises stops the scorer.
      layouts: the layouts that a reward model's batches reuse from call to call; None: each call
        plans its own.
      name: what a reward model's batches are called in `layouts`.

    Raises:
      ConfigError: if a function, a judge's template or a judge's key is missing.
    """
    if config.reward.parts:
        scorers = {}
        for part_name, part in config.reward.parts.items():
            alone = dataclasses.replace(config, reward=part_to_reward(part, config.reward))
            try:
                single = _make_single_scorer(
                    alone, mesh, renderer, layouts, f"{name} {part_name}", check
                )
                scorers[part_name] = (part, single)
            except (ConfigError, RewardError) as error:
                raise type(error)(f"reward.parts.{part_name}: {error}") from error
        scorer = make_sum_scorer(scorers)
    else:
        scorer = _make_single_scorer(config, mesh, renderer, layouts, name, check)
    if not config.reward.cut_at_sentence:
        return scorer
    known = _require(renderer)
    return lambda samples: scorer([cut_at_sentence(sample, known) for sample in samples])


def _require(renderer: Renderer | None) -> Renderer:
    if renderer is None:
        raise ConfigError(
            "model.path: got '', but the reward needs the tokenizer of the samples; set "
            "--config.model.path=DIR, or model.tokenizer alone"
        )
    return renderer


def _make_single_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    layouts: LayoutMemory | None,
    name: str,
    check: Callable[[], None],
) -> Scorer:
    make = load(REWARD_KINDS[config.reward.kind].make)
    scorer: Scorer = make(config, mesh, renderer, layouts, name, check)
    return scorer


def make_user_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    layouts: LayoutMemory | None,
    name: str,
    check: Callable[[], None],
) -> Scorer:
    """Return the scorer that calls the user's function, `reward.function`."""
    reward = config.reward
    return make_function_scorer(
        reward.function, reward.arguments, form=reward.completions, check=check
    )


def make_asking_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    layouts: LayoutMemory | None,
    name: str,
    check: Callable[[], None],
) -> Scorer:
    """Return the scorer that asks the judge of `reward.judge`."""
    # A task that samples may ask the judge only hours later, so it tries it now.
    is_known = TASKS[config.task].samples and probe_judge(config)
    return make_judge_scorer(config, check, is_known=is_known)


def make_no_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    layouts: LayoutMemory | None,
    name: str,
    check: Callable[[], None],
) -> Scorer:
    """Return the scorer that gives no sample a reward."""
    return lambda samples: [None] * len(samples)


def cut_at_sentence(sample: Sample, renderer: Renderer) -> Sample:
    """Return the sample cut after its last ".", "!" or "?", as if it had ended there.

    A sample that already ends there, or has none of them, is returned as it is.
    """
    text = sample.output.rstrip()
    found = _LAST_SENTENCE.match(text)
    if not found or found[0] == text:
        return sample
    ids = renderer.render_response(found[0], finished=True)
    return dataclasses.replace(
        sample, output=found[0], response_ids=tuple(ids), finish_reason=FINISH_STOP
    )


def make_model_scorer(
    config: Config,
    mesh: Mesh,
    renderer: Renderer | None,
    layouts: LayoutMemory | None = None,
    name: str = "reward",
    check: Callable[[], None] = lambda: None,
) -> Scorer:
    """Return the scorer that runs a sequence classifier, whose params stay on the devices.

    `rewards/read_at.py` chooses the tokens that it gets, and so the one where its score is read.
    Samples with the same tokens are scored once, so that rounding cannot make their rewards differ.
    `layouts` and `check` are those of `make_scorer`; `name` is the name of its batches in
    `layouts`.

    Raises:
      ModelError: if the model cannot be read or is not a sequence classifier.
    """
    spec = _read_classifier(config)
    params = hf.load_params(config.reward.path, spec, mesh)
    prepare = make_preparer(config, _require(renderer), load_reward_renderer(config.reward))
    compute = _compile_scores(spec, mesh)

    def run(params: Params, batch: Batch) -> jax.Array:
        check()
        return compute(params, batch)

    def score(samples: Sequence[Sample]) -> list[float | None]:
        samples = _cut_all(prepare(samples), config.reward.max_length)
        _report_positions(samples, spec.max_positions)
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], Sample] = {}
        for sample in samples:
            distinct.setdefault((sample.prompt_ids, sample.response_ids), sample)
        # A token id beyond the embedding would silently get the row of another token.
        largest = max(max(sample.prompt_ids + sample.response_ids) for sample in distinct.values())
        vocab.check_ids(largest, spec, config.reward.path)
        if spec.gating is not None:
            _check_prompt_ends(distinct.values(), spec.gating.prompt_end, config.reward.path)
        known = layouts.find(name) if layouts else None
        with explain_memory("score", "scoring by the reward model", config):
            rewards, layout = _score_items(
                run, params, list(distinct.values()), config, mesh, known
            )
        if layouts:
            layouts.keep(name, layout)
        reward_of = dict(zip(distinct, rewards, strict=True))
        return [reward_of[sample.prompt_ids, sample.response_ids] for sample in samples]

    return score


def _read_classifier(config: Config) -> DecoderConfig:
    """Return the architecture of the reward model, with the config's settings for running it."""
    settings = dataclasses.replace(
        config.model,
        path=config.reward.path,
        compute_dtype=config.reward.compute_dtype,
        params_dtype=config.reward.compute_dtype,
        random_init=False,
        remat="none",
    )
    spec = hf.load_decoder_config(config.reward.path, settings)
    if not spec.num_labels:
        raise ModelError(
            f"reward.path: got {config.reward.path!r}, a model without a classification head; "
            "allowed: a *ForSequenceClassification model with 1 or 2 labels"
        )
    refuse_longer(spec, {"reward.max_length": config.reward.max_length})
    return spec


def _check_prompt_ends(samples: Iterable[Sample], end: tuple[int, ...], path: str) -> None:
    """Raise a RewardError if a prompt does not end as the reward model's gate expects."""
    for sample in samples:
        found = tuple(sample.prompt_ids[-len(end) :])
        if found != end:
            raise RewardError(
                f"reward.path: {path!r} reads what counts for a prompt at the tokens {end} that "
                f"end one in its chat template; got {found} for prompt {sample.prompt.prompt_id}; "
                "use the tokenizer and the template that the model came with"
            )


def _compile_scores(spec: DecoderConfig, mesh: Mesh) -> Callable[[Params, Batch], jax.Array]:
    def run(params: Params, batch: Batch) -> jax.Array:
        scores: jax.Array = jax.lax.map(
            lambda one: decoder.compute_scores(params, one, spec), batch
        )
        return scores

    compiled: Callable[[Params, Batch], jax.Array] = jax.jit(
        run, out_shardings=sharding.replicated(mesh)
    )
    return compiled


def _score_items(
    run: Callable[[Params, Batch], jax.Array],
    params: Params,
    samples: Sequence[Sample],
    config: Config,
    mesh: Mesh,
    known: Sequence[Layout] | None,
) -> tuple[list[float], Layout]:
    rows, tokens = sharding.num_row_shards(mesh), config.train.tokens_per_device
    items, members = make_group_items(samples, max_tokens=tokens)
    mean = sum(item.num_tokens for item in items) / len(items)
    most = max(int(0.9 * rows * tokens / mean), 1)
    plan = plan_batches(
        items,
        batch_size=divide_up(
            len(items), divide_up(len(items), most)
        ),  # as few batches, and no leftover
        num_rows=rows,
        tokens_per_row=tokens,
        row_multiple=config.train.row_multiple,
        seed=0,  # the order does not matter; a random one makes the batches equally large
        known=known,
    )
    rewards = np.full(len(samples), np.nan)
    bar = make_progress(len(plan), "score", unit="batches", enabled=config.progress)
    for step in range(len(plan)):
        batch = sharding.put_batch(build_batch(items, plan, step), mesh, leading=1)
        scores = np.asarray(run(params, batch))
        for index, values in split_scores(plan, step, items, scores):
            rewards[members[index]] = values
        bar.update(1)
        sign_of_life()
    bar.close()
    if not np.isfinite(rewards).all():
        raise RewardError(
            f"the reward model gave {np.sum(~np.isfinite(rewards))} non-finite scores of "
            f"{len(rewards)}; check reward.path and reward.compute_dtype"
        )
    return rewards.tolist(), plan.layout


def _cut_all(samples: Sequence[Sample], max_length: int) -> list[Sample]:
    """Cut responses to the room that their prompts leave, but at least to one token."""
    rooms = [max(max_length - len(sample.prompt_ids), 1) for sample in samples]
    count = sum(len(one.response_ids) > room for one, room in zip(samples, rooms, strict=True))
    if count:
        say_once(
            logger,
            "%d of %d samples are longer than reward.max_length=%d: the rest is not scored",
            count,
            len(samples),
            max_length,
        )
    return [
        dataclasses.replace(one, response_ids=one.response_ids[:room])
        for one, room in zip(samples, rooms, strict=True)
    ]


def _report_positions(samples: Sequence[Sample], positions: int) -> None:
    tally = Tally()
    for sample in samples:
        tally.add(len(sample.prompt_ids) + len(sample.response_ids), positions)
    report_positions("reward.path", tally, positions)
