"""What a run is, in a few lines: said at its start, and by `mode=show`, which starts nothing.

It is read from the config, the configs of models and the manifests of the workdir: no weights, no
data and no tokenizer are loaded.
"""

import contextlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from halos_jax import config as config_lib
from halos_jax import sharding
from halos_jax.config import Config, ConfigError, schema
from halos_jax.config.kinds import REWARD_KINDS
from halos_jax.config.tasks import TASKS, is_scored
from halos_jax.console.summary import Fact, format_facts
from halos_jax.console.values import find_width
from halos_jax.course.budget_text import describe_budget, find_traps
from halos_jax.course.rates import check_rate
from halos_jax.course.round_size import expect_size
from halos_jax.errors import UserError
from halos_jax.json_text import parse_json
from halos_jax.losses import settle_sampling
from halos_jax.models import spec
from halos_jax.models.files import hf
from halos_jax.rounds.budget import Budget
from halos_jax.rounds.outcome.table import format_rounds, last_round
from halos_jax.rounds.report import list_sizes
from halos_jax.storage import format_size
from halos_jax.tasks.round_facts import describe_final, describe_guard, describe_sizes
from halos_jax.workdir import changes, manifests, runs
from halos_jax.workdir.manifests import round_folder

_OWN = ("pipeline", "toy_data", "bench")  # tasks whose config says all that there is to say
_COMPLETE = "complete, unless it was given more to do"


def run_show(config: Config) -> None:
    """Print the config, the budget and what would be resumed, for `mode=show`."""
    if jax.process_index():
        return
    is_pipeline = config.task == "pipeline"
    stages = config_lib.expand_pipeline(config) if is_pipeline else [config]
    print(format_facts("this machine", describe_machine()))
    for stage in stages:
        print(f"\n{describe_task(stage)}")
        for line in (*_list_budget(stage), *_list_warnings(stage)):
            print(line)
        if (Path(stage.workdir) / "rounds" / "0000").is_dir():
            print(format_rounds(Path(stage.workdir), width=find_width()))
    print("\nevery field; those with * are not at their default")
    for line in list_fields(config):
        print(line)


def describe_machine() -> list[Fact]:
    """Return what the devices of the job are, and the versions of what runs on them."""
    kinds = Counter(device.device_kind for device in jax.devices())
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    each = f", {format_size(memory)} each" if memory else ""
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    count = jax.process_count()
    versions = {"halos_jax": _find_version(), "jax": jax.__version__}
    versions["Python"] = platform.python_version()
    return [
        ("devices", devices + each + (f", of {count} processes" if count > 1 else "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def describe_task(config: Config) -> str:
    """Return what a task works with: its models, its data, its devices and its place."""
    task = TASKS[config.task]
    title = f"task {config.task}: {task.summary}"
    if config.task in _OWN:
        return format_facts(title, [("workdir", config.workdir)])
    loss = {"name": task.loss} if task.loss else config.loss
    has_model = task.policy != "none"
    return format_facts(
        title,
        [
            ("model", _describe_model(config) if has_model and config.model.path else ""),
            ("branch", _describe_branch(config)),
            ("adapter", _describe_adapter(config) if task.trains else ""),
            ("template", _describe_template(config) if has_model else ""),
            ("loss", _describe_loss(config, loss) if task.trains or task.has_reference else ""),
            ("reward", _describe_reward(config) if is_scored(config) else ""),
            ("data", config.data.train if task.data == "data.train" else config.data.eval),
            ("against", _describe_second(config)),
            ("held out", _describe_held_out(config) if task.watches or task.trains else ""),
            ("test", config.data.test if "data.test" in task.reads else ""),
            ("training", _describe_training(config) if task.trains else ""),
            ("sampling", _describe_sampling(config) if task.samples else ""),
            ("rounds", describe_sizes(config) if task.first_stages else ""),
            ("guard", describe_guard(config) if task.first_stages else ""),
            ("final", describe_final(config) if task.first_stages else ""),
            ("mesh", _describe_mesh(config) if task.on_mesh else ""),
            ("workdir", f"{config.workdir} ({_list_written(config)})"),
            ("hub", _describe_push(config) if task.exports else ""),
            ("start", describe_place(config)),
        ],
    )


def describe_place(config: Config) -> str:
    """Say whether a run in the workdir would be new, go on or be refused, and where it goes on."""
    workdir = Path(config.workdir)
    try:
        runs.refuse_other(config)
        rounds = workdir / "rounds"
        if rounds.is_dir() and any(path.name.isdigit() for path in rounds.iterdir()):
            return _describe_rounds(config)
        manifest = manifests.load_manifest(workdir)
    except UserError as error:
        return f"refused: {error}"
    except OSError as error:
        return f"refused: it cannot be read ({error})"
    if manifest is not None:
        done = f"done: {', '.join(manifest.stages) or 'nothing'}"
        return f"{done}; " + (
            "complete" if manifest.next_stage is None else f"goes on with {manifest.next_stage}"
        )
    if (workdir / "final").is_dir():
        return _describe_end(config)
    saved = workdir / "checkpoints"
    if saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir()):
        return "goes on from its newest checkpoint"
    return "new"


def list_fields(config: Config) -> list[str]:
    """Return a line for each field of a config, marked where it is not at its default."""
    defaults = dict(schema.flatten(schema.to_plain(Config())))
    values = dict(schema.flatten(schema.to_plain(config)))
    return [
        f"{'*' if value != defaults.get(path) else ' '} {path} = {value!r}"
        for path, value in values.items()
    ]


# --------------------------------------------------------------------------- the single facts


def _find_version() -> str:
    try:
        return metadata.version("halos_jax")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _describe_model(config: Config) -> str:
    settings = config.model
    folder = _find_folder(settings.path)
    if folder is None:
        return f"{settings.path} (not on this machine yet)"
    try:
        decoder = hf.load_decoder_config(str(folder), settings)
        family = hf.read_hf_config(folder).get("model_type", "?")
    except UserError as error:
        return f"{settings.path} (not readable: {error})"
    drawn = "drawn anew, " if settings.random_init else ""
    return (
        f"{settings.path} ({drawn}{family}, {spec.count_params(decoder):,} parameters in "
        f"{decoder.params_dtype}, computed in {decoder.compute_dtype})"
    )


def _find_folder(path: str) -> Path | None:
    """Return the folder of a model: a run's is its `final/`, a hub id's the one that is cached."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / "final" if (folder / "final").is_dir() else folder
    with contextlib.suppress(HFValidationError):  # a path that is not there
        cached = try_to_load_from_cache(path, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def _describe_adapter(config: Config) -> str:
    lora = config.lora
    if lora.path:
        return f"LoRA from {lora.path}"
    alpha = lora.alpha or 4.0 * lora.rank
    return f"LoRA of rank {lora.rank}, alpha {alpha:g}" if lora.rank else ""


def _describe_branch(config: Config) -> str:
    branch = config.branch
    if not branch.workdir:
        return ""
    round = f"round {branch.round}" if branch.round else "the newest state"
    moments = "with" if branch.optimizer else "without"
    return f"starts from {round} of {branch.workdir}, {moments} the optimizer's moments"


def _describe_template(config: Config) -> str:
    settings = config.model
    if settings.chat_template:
        return settings.chat_template
    folder = _find_folder(settings.path)
    if folder is None:
        return ""
    if (folder / "chat_template.jinja").is_file():
        return "the tokenizer's own (chat_template.jinja)"
    file = folder / "tokenizer_config.json"
    stored: Any = {}
    with contextlib.suppress(OSError, ValueError):  # whoever loads the tokenizer says what is wrong
        stored = parse_json(file.read_bytes()) if file.is_file() else {}
    if isinstance(stored, Mapping) and stored.get("chat_template"):
        return "the tokenizer's own (tokenizer_config.json)"
    return "none in the model's folder: the default one" if file.is_file() else ""


def _describe_loss(config: Config, loss: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name}={value}" for name, value in loss.items() if name != "name")
    shown = f"{loss['name']}{f' ({values})' if values else ''}"
    if config.model.teacher:
        shown += f"; teacher: {config.model.teacher}"
    elif TASKS[config.task].has_reference:
        shown += f"; reference: {config.model.reference or config.rounds.reference}"
    return shown


def _describe_reward(config: Config) -> str:
    reward = config.reward
    parts = [
        f"{part.weight:g} x {name} ({_name_reward(part)})" for name, part in reward.parts.items()
    ]
    shown = [" + ".join(parts) or _name_reward(reward)]
    if reward.rules:
        shown.append(f"rules for the log: {', '.join(reward.rules)}")
    if config.eval.scorers:
        own = [f"{name} ({_name_reward(one)})" for name, one in config.eval.scorers.items()]
        shown.append(f"second scorers of held-out samples: {', '.join(own)}")
    return "; ".join(shown)


def _name_reward(reward: Any) -> str:
    """Return the kind of a reward and what it names: a model, a function, a judge."""
    needs = REWARD_KINDS[reward.kind].needs
    value = reward
    for name in needs.split(".") if needs else ():
        value = getattr(value, name)
    return f"{reward.kind} {value}" if needs else str(reward.kind)


def _describe_held_out(config: Config) -> str:
    data = config.data
    if TASKS[config.task].data == "data.eval":
        return ""
    if data.eval:
        return data.eval
    return f"{data.holdout:,} prompts of the data" if data.holdout else "none: nothing is evaluated"


def _describe_training(config: Config) -> str:
    train, optimizer = config.train, config.optimizer
    return (
        f"batches of {train.batch_size}, {train.epochs} epochs of at most {train.max_length} "
        f"tokens an example; {optimizer.name}, rate {optimizer.learning_rate:g} "
        f"({optimizer.schedule})"
    ).replace(" 1 epochs", " 1 epoch")


def _describe_sampling(config: Config) -> str:
    sampling = config.sampling
    return (
        f"{sampling.num_samples_per_prompt} a prompt, at most {sampling.max_tokens} tokens, "
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        f"{_describe_exact(_find_begun(config))}"
    )


def _find_begun(config: Config) -> Config:
    """Return the config with which a run in the workdir would go on."""
    try:
        return runs.find_begun(config)
    except UserError:  # which `describe_place` says
        return config


def _describe_exact(config: Config) -> str:
    """Say whether ratios to the policy that sampled are exact, and by whose choice."""
    sampling, settled = config.sampling, settle_sampling(config)
    if not settled.exact_ratios:
        return ""
    if sampling.exact_ratios != "auto":
        return "; exact ratios"
    shown = f"; exact ratios, by sampling.exact_ratios=auto for loss {config.loss['name']}"
    if settled.max_kept > sampling.max_kept:
        size = format_size(4 * settled.max_kept)
        shown += f", with max_kept raised to top_k={settled.max_kept} ({size} a token)"
    return shown


def _describe_second(config: Config) -> str:
    """Name what a policy or its samples are compared with."""
    named = {"eval": config.eval.against, "compare": config.eval.second_samples}
    return named.get(config.task, "")


def _describe_mesh(config: Config) -> str:
    try:
        return sharding.describe(sharding.make_mesh(config.mesh))
    except ConfigError as error:
        return f"refused: {error}"


def _describe_push(config: Config) -> str:
    export = config.export
    kind = "private" if export.private else "public"
    return f"pushed at the end to {export.push_to_hub} ({kind})" if export.push_to_hub else ""


def _list_written(config: Config) -> str:
    """Name what a task leaves in its workdir."""
    task = TASKS[config.task]
    names = ["metrics.jsonl"] if task.trains else []
    names += ["rounds/"] if task.first_stages else []
    names += ["checkpoints/", "final/"] if task.trains else []
    own = {"sample": "samples.jsonl", "label": "feedback.jsonl", "eval": "result.json"}
    own["compare"] = "comparison.json"
    return ", ".join(names) or own.get(config.task, "final/")


def _describe_end(config: Config) -> str:
    """Say whether a run that has a `final/` is given more to do by the fields that have grown."""
    workdir = Path(config.workdir)
    if (workdir / changes.FILE).exists():
        history = changes.read_history(workdir, config)
        if more := history.pick("growing") if history.has_more else []:
            return f"goes on, with more to do: {', '.join(map(str, more))}"
    return _COMPLETE


def _describe_rounds(config: Config) -> str:
    workdir = Path(config.workdir)
    last = last_round(workdir)
    manifest = manifests.load_manifest(round_folder(workdir, last))
    if manifest is None:
        return f"goes on in round {last}, stage {manifests.stages_of(last)[0]}"
    if manifest.next_stage is None:
        done = f"rounds 0 to {last} are done" if last else "round 0 is done"
        has_final = (workdir / "final").is_dir()
        return f"{done}; {_describe_end(config) if has_final else 'goes on after it'}"
    return f"goes on in round {last}, stage {manifest.next_stage}"


def _list_budget(config: Config) -> Iterator[str]:
    """Yield the lines of an online run's budget, if there are prompts enough for it."""
    if config.task != "online":
        return
    config = _find_begun(config)
    rounds = config.rounds
    budget = Budget(rounds.total_prompts, expect_size(config), rounds.num_skip)
    count = rounds.num_skip + rounds.total_prompts
    sizes = list_sizes(config, budget, count, lambda _: config.train.epochs)
    yield from describe_budget(config, sizes)
    yield from (f"warning: {line}" for line in find_traps(config, sizes))


def _list_warnings(config: Config) -> Iterator[str]:
    """Yield a warning of a learning rate that is far from those that suit the task."""
    folder = _find_folder(config.model.path) if config.model.path else None
    count = None
    with contextlib.suppress(UserError):  # `_describe_model` says it
        if folder is not None:
            count = spec.count_params(hf.load_decoder_config(str(folder), config.model))
    if line := check_rate(config, count):
        yield f"warning: {line}"
