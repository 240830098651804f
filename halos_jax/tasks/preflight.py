"""Checks that are possible before a run begins, without reading weights or writing anything.

A task makes most of these checks itself when it starts. They are made here before the first stage
of a pipeline, because its last stage would fail hours later, and for `mode=check`.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from halos_jax import config as config_lib
from halos_jax.config import BranchConfig, Config, ConfigError, SamplingConfig
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.config.tasks import TASKS, is_scored, load
from halos_jax.course.rates import warn_of_rate
from halos_jax.course.round_size import expect_size
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import keep_shown
from halos_jax.data.selection import select_eval, select_train
from halos_jax.errors import UserError
from halos_jax.losses import get_loss
from halos_jax.models import lora
from halos_jax.models.files import hf
from halos_jax.models.hf import families
from halos_jax.models.hf.families import ModelError
from halos_jax.models.spec import DecoderConfig
from halos_jax.policies import hub, source
from halos_jax.policies.against import find_against
from halos_jax.policies.branch import find_branch
from halos_jax.policies.policy import Policy, find_policy, start_policy
from halos_jax.policies.reference import attach_reference
from halos_jax.policies.teacher import describe_teacher
from halos_jax.rewards.function_scorer import (
    check_records,
    make_function_scorer,
    make_rules,
)
from halos_jax.rewards.held_out import check_held_out, list_scorers
from halos_jax.rewards.judge.scorer import probe_judge
from halos_jax.rewards.parts import name_fields, part_to_reward
from halos_jax.rounds import cuts
from halos_jax.rounds.budget import Budget, describe_shortage
from halos_jax.rounds.order import spread_passes, start_order
from halos_jax.rounds.outlook import refuse_no_rounds
from halos_jax.rounds.prompts import RunPrompts, check_lengths, load_prompts, load_usable
from halos_jax.rounds.report import report_budget
from halos_jax.storage import WorkdirError
from halos_jax.tasks import label as label_task
from halos_jax.tasks import sample as sample_task
from halos_jax.tasks import train as single
from halos_jax.workdir import runs

logger = logging.getLogger(__name__)


def run_check(config: Config) -> None:
    """Check a run for `mode=check`: raise all errors together, or log that there are none."""
    check_start(config, with_data=True)
    hub.warn_of_no_token(config.export)
    logger.info("checked: nothing to mend; the weights were not read, and nothing was written")


def check_start(config: Config, *, with_data: bool) -> None:
    """Check a run, or each stage of a pipeline, and raise all errors together.

    The output of earlier stages (their `final/`, their files) is assumed to be there.

    Args:
      with_data: also read and render the data.

    Raises:
      ConfigError: with one line per error.
    """
    is_pipeline = config.task == "pipeline"
    stages = config_lib.expand_pipeline(config) if is_pipeline else [config]
    lines, made = list[str](), list[Path]()
    for stage in stages:
        found = list(_find_errors(stage, made, with_data))
        prefix = f"pipeline.overrides.{stage.task}: " if is_pipeline else ""
        lines += [prefix + line for line in found]
        made.append(Path(stage.workdir).absolute())
    lines = list(dict.fromkeys(lines))
    if lines:
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        listed = "\n".join(f"  - {line}" for line in lines)
        raise ConfigError(f"{count} found before anything was run:\n{listed}")


def _find_errors(config: Config, made: Sequence[Path], with_data: bool) -> Iterable[str]:
    """Yield a line for each error in a run of one task."""
    if not TASKS[config.task].on_mesh:
        return
    found: list[Any] = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> Iterable[str]:
        try:
            found[:] = [check(*arguments)]
        except UserError as error:
            found[:] = []
            yield str(error)

    yield from attempt(_check_places, config)
    if is_scored(config):
        yield from attempt(_check_reward, config, made)
    if not config.model.path:  # samples of any model, read with the tokenizer of the reward model
        if found and with_data and not made:
            yield from attempt(_check_data, config, None, made)
        return
    if is_made(config.model.path, made):
        return
    yield from attempt(_find_policy, config, made)
    if found and with_data:
        yield from attempt(_check_data, config, found[0], made)


def is_made(path: str, made: Sequence[Path]) -> bool:
    """Tell whether a path lies in a folder that the run itself will make."""
    return bool(path) and any(Path(path).absolute().is_relative_to(folder) for folder in made)


# --------------------------------------------------------------------------- the single checks


def _check_places(config: Config) -> None:
    """Raise WorkdirError if the run cannot write somewhere, or may not resume with this config."""
    for field, path in (
        ("workdir", config.workdir),
        ("sampling.output", config.sampling.output),
        ("export.output", config.export.output),
    ):
        if path:
            absolute = Path(path).expanduser().absolute()
            _require_writable(field, absolute, is_folder=field != "sampling.output")
    runs.refuse_other(config)


def _require_writable(field: str, path: Path, *, is_folder: bool) -> None:
    present = next(one for one in (path, *path.parents) if one.exists())
    if not present.is_dir() and (is_folder or present != path):
        wanted = path if is_folder else path.parent
        raise WorkdirError(
            f"{field}: {present} is a file, but {wanted} is to be a folder; choose another place, "
            "or move the file away"
        )
    if path.is_dir() and not is_folder:
        raise WorkdirError(f"{field}: {path} is a folder; allowed: the name of a file")
    if not os.access(present, os.W_OK):
        raise WorkdirError(
            f"{field}: {present} cannot be written, so {path} cannot be made; give yourself write "
            "permission, or choose another folder"
        )


def _check_reward(config: Config, made: Sequence[Path]) -> None:
    parts = [part_to_reward(part, config.reward) for part in config.reward.parts.values()]
    for reward in parts or [config.reward]:
        alone = dataclasses.replace(config, reward=reward)
        load(REWARD_KINDS[reward.kind].check)(alone, made)
    make_rules(config.reward)
    for name, alone in list_scorers(config).items():
        with name_fields(f"eval.scorers.{name}."):
            load(REWARD_KINDS[alone.reward.kind].check)(alone, made)


def check_reward_function(config: Config, made: Sequence[Path]) -> None:
    """Import the user's function and check its parameters."""
    reward = config.reward
    make_function_scorer(reward.function, reward.arguments, form=reward.completions)


def check_reward_judge(config: Config, made: Sequence[Path]) -> None:
    """Ask the judge's service whether it knows the model."""
    probe_judge(config)


def check_no_reward(config: Config, made: Sequence[Path]) -> None:
    """Check nothing: there is no reward."""


def check_reward_model(config: Config, made: Sequence[Path]) -> None:
    """Read a reward model's config and tokenizer, unless an earlier stage will make it."""
    reward = config.reward
    if is_made(reward.path, made):
        return
    path = source.find_model("reward.path", reward.path)
    if not hf.load_decoder_config(path).num_labels:
        raise ModelError(
            f"reward.path: got {reward.path!r}, a model without a classification head; allowed: a "
            "*ForSequenceClassification model with 1 or 2 labels"
        )
    load_renderer(path)


def _find_policy(config: Config, made: Sequence[Path]) -> Policy:
    """Return the policy; refuse a model of a kind that the task cannot use."""
    task, model = TASKS[config.task], config.model
    if task.trains:
        path = source.find_model("model.path", model.path)
        model = dataclasses.replace(model, path=path)
        policy = start_policy(dataclasses.replace(config, model=model))
        if config.lora.rank and not config.lora.path:
            family = families.get_family(hf.read_hf_config(hf.resolve_model(path)))
            lora.make_adapter(config.lora, policy.decoder, family, seed=config.seed)
    else:
        policy = find_policy(model, control=config.data.control)
    by_feedback = config.task == "eval" and config.eval.on == "feedback"
    scores = by_feedback and get_loss(config.loss).needs == "scores"
    if task.policy == "language" and not scores:
        policy.refuse_classifier(config.model.path)
    if config.model.teacher and not is_made(config.model.teacher, made):
        describe_teacher(config, policy)
    is_new = not (Path(config.workdir) / "checkpoints").is_dir()
    if config.branch.workdir and is_new and not is_made(config.branch.workdir, made):
        find_branch(config)
    if config.model.reference and not is_made(config.model.reference, made):
        attach_reference(policy, config)
    against = config.eval.against if config.task == "eval" else ""
    if against and not is_made(against, made):
        find_against(config, policy)
    return policy


def _check_data(config: Config, policy: Policy | None, made: Sequence[Path]) -> None:
    """Read and render the data as the task does, unless an earlier stage will make them."""
    data, check = config.data, TASKS[config.task].check_data
    texts = (data.train, data.eval, data.test, config.eval.second_samples)
    sources = [path for text in texts for path in text.split(",")]
    if any(is_made(path, made) for path in sources):
        return
    # No other stage of a pipeline is an online run, and no other run has used prompts of an order.
    if is_made(config.branch.workdir, made):
        config = dataclasses.replace(config, branch=BranchConfig())
    if check:
        decoder, renderer = (policy.decoder, policy.renderer) if policy else (None, None)
        load(check)(config, decoder, renderer)


def check_online_data(config: Config, decoder: DecoderConfig, renderer: Renderer) -> None:
    """Check the prompts of all rounds, the held-out prompts and those of the test set."""
    rounds, skip = config.rounds, config.rounds.num_skip
    needed = skip + rounds.total_prompts
    prompts, others, test = load_prompts(config, renderer, needed, start_order(config))
    budget = Budget(rounds.total_prompts, expect_size(config), skip)
    passes = rounds.passes
    refuse_no_rounds(budget, len(prompts), passes)
    if shortage := describe_shortage(budget, len(prompts), passes):
        logger.warning("%s", shortage)
    spread_passes(prompts, config, needed)
    report_budget(config, budget, len(prompts), lambda round: config.train.epochs)
    warn_of_rate(config, decoder)
    limited = _Limits(config.sampling, decoder, renderer)
    used = RunPrompts(prompts, others, test).cut(skip, needed, config)
    check_lengths(limited, config, used)


def check_sampled_data(config: Config, decoder: DecoderConfig, renderer: Renderer) -> None:
    """Check the prompts that the task samples from."""
    ordered = sample_task.load_ordered(config)
    needed = config.rounds.num_skip + (config.sampling.num_prompts or len(ordered))
    ordered = keep_shown(ordered, renderer, skip=config.data.skip_bad, count=needed)
    prompts = sample_task.select_prompts(config, ordered)
    cuts.check_prompts(_Limits(config.sampling, decoder, renderer), (config.data.train, prompts))
    sample_task.check_instructions(config, prompts)
    if config.sampling.best_of:
        check_records(config.reward, prompts)


def check_held_out_data(config: Config, decoder: DecoderConfig, renderer: Renderer) -> None:
    """Check the held-out prompts or the held-out feedback."""
    if config.eval.on == "feedback":
        check_fixed_data(config, decoder, renderer)
        return
    prompts = load_usable(config.data.eval, select_eval, config, renderer)
    check_held_out(config, prompts)
    cuts.check_prompts(_Limits(config.sampling, decoder, renderer), (config.data.eval, prompts))


def check_labelled_data(config: Config, decoder: object, renderer: object) -> None:
    """Check the samples that the task labels."""
    data = config.data
    edits = select_train(data, config.seed).edits
    samples = label_task.read_all_samples(data.train, data.train_split, edits)
    check_records(config.reward, [one.prompt for one in samples], skip=data.skip_bad)


def check_fixed_data(config: Config, decoder: DecoderConfig, renderer: Renderer) -> None:
    """Check the records that the loss is computed on, for training and held-out."""
    data, trains = config.data, TASKS[config.task].trains
    loss = single.choose_loss(config) if trains else get_loss(config.loss)
    sources = [(data.held_out, select_eval(data))] if data.held_out else []
    if trains:
        warn_of_rate(config, decoder)
        sources.append((data.train, select_train(data, config.seed)))
    for path, selection in sources:
        single.load_fixed_items(
            config, loss, renderer, path, selection, positions=decoder.max_positions
        )


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The token limits of a sampler without the sampler itself; implements `cuts.Limited`."""

    settings: SamplingConfig
    decoder: DecoderConfig
    renderer: Renderer
