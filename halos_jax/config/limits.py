"""Checks that types cannot express: the form of texts, and combinations that make no sense.

They get the config flat, as path -> value, and so need none of its classes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from halos_jax.config import field_names
from halos_jax.config.kinds import FEEDBACK_TYPES, ITEM_KINDS, REWARD_KINDS
from halos_jax.config.tasks import TASKS, load

# Path of a field that a task may need -> (what it must be, an example).
_NEEDED = {
    "model.path": ("a folder or hub id", "DIR"),
    "data.train": ("a file or hub data set", "FILE"),
    "data.eval": ("a file or hub data set", "FILE"),
    "eval.second_samples": ("a file of samples", "FILE"),
}

# Names after "reward_eval/" that metrics have: an interval's ends, the reward without penalties.
_TAKEN = ("low", "high", "unpenalised")


def find_violations(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each bad text or combination; `bounds` checks single numbers.

    Args:
      values: path -> value of every field, each of the right type.
    """
    yield from _check_mesh(values)
    yield from _check_names(values)
    yield from _check_data(values)
    yield from _check_judge(values, "reward")
    yield from _check_lora(values)
    yield from _check_parts(values)
    yield from _check_held_out(values)
    task = TASKS[values["task"]]
    if values["mode"] not in task.modes:
        allowed = ", ".join(map(repr, task.modes))
        yield f"mode: got {values['mode']!r}, allowed with task={values['task']!r}: {allowed}"
    if task.is_scored(values.__getitem__):
        yield from load("halos_jax.rewards.samples:check_no_reward")(values)
        if not _list_parts(values):
            yield from _check_reward(values, "reward")
        if task.samples:
            yield from _check_lengths(values)
    if task.makes_feedback:
        yield from load("halos_jax.rounds.replay.allowed:check_replay")(values)
        yield from _check_threshold(values)
        yield from _check_pairs(values)
    if task.limits:
        yield from load(task.limits)(values)


def _check_mesh(values: Mapping[str, Any]) -> Iterable[str]:
    axes = {axis: values[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
    sizes = list(axes.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        yield f"mesh: got {axes}, allowed: sizes of 1 or more, and -1 for one axis at most"


def _check_names(values: Mapping[str, Any]) -> Iterable[str]:
    task, loss = values["task"], values.get("loss.name")
    if not values["workdir"]:
        yield "workdir: got '', allowed: a folder; set --config.workdir=DIR"
    for path in TASKS[task].needs:
        if not values[path]:
            allowed, example = _NEEDED[path]
            yield f"{path}: got '', allowed: {allowed}; set --config.{path}={example}"
    if values["model.checkpoint"] != "auto" and TASKS[task].trains:
        yield (
            f"model.checkpoint: got {values['model.checkpoint']}, allowed for task={task!r}: "
            "'auto'; export that checkpoint with --config.task=export and start from the result"
        )
    if not isinstance(loss, str):
        yield f"loss.name: got {loss!r}, allowed: the name of a loss; set --config.loss.name=dpo"
    added = values["model.added_tokens"]
    if "" in added or len(set(added)) < len(added):
        yield f"model.added_tokens: got {added!r}, allowed: distinct tokens that are not empty"
    tokens = values["data.good_token"], values["data.bad_token"]
    if loss == "csft" and (tokens[0] == tokens[1] or "" in tokens):
        yield f"data.good_token, data.bad_token: got {tokens}, allowed: two texts that differ"
    if values["sampling.shrink"] == 1 or values["sampling.shrink"] < 0:
        yield f"sampling.shrink: got {values['sampling.shrink']}, allowed: 0 (never), or 2 or more"
    rules = [name.rpartition(":")[2] for name in values["reward.rules"]]
    if len(set(rules)) < len(rules) or set(rules) & set(_TAKEN):
        yield f"reward.rules: got {rules}, allowed: functions of different names, not {_TAKEN}"
    if "" in values["sampling.stop"]:
        yield "sampling.stop: got an empty string, which would end every sample at once"
    yield from _check_exact(values)


def _check_exact(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse exact ratios where nothing is drawn, and more tokens than a set can hold."""
    if values["sampling.exact_ratios"] is not True:  # "auto" is off, or makes room, by itself
        return
    top_k, most = values["sampling.top_k"], values["sampling.max_kept"]
    if values["sampling.temperature"] == 0:
        yield (
            "sampling.exact_ratios: got True, allowed with sampling.temperature=0: False; greedy "
            "decoding draws nothing, so there is no ratio of probabilities"
        )
    if top_k > most:
        yield (
            f"sampling.top_k: got {top_k}, allowed with sampling.exact_ratios: at most "
            f"sampling.max_kept={most}; lower it, or raise the latter"
        )


# Fields that change prompts, which tasks that keep the prompts of samples refuse.
_CHANGE_PROMPTS = ("data.prompt_template", "data.system_prompt", "data.merge_turns")


def _check_data(values: Mapping[str, Any]) -> Iterable[str]:
    for path, parse in (
        ("data.fields", field_names.parse_names),
        ("data.prompt_template", field_names.parse_template),
    ):
        try:
            parse(values[path])
        except ValueError as error:
            yield f"{path}: {error}"
    for path in _CHANGE_PROMPTS if TASKS[values["task"]].keeps_prompts else ():
        if values[path]:
            yield (
                f"{path}: got {values[path]!r}, allowed with task={values['task']!r}: "
                f"{type(values[path])()!r}; samples keep the prompts that they were sampled from"
            )


# Field that has no effect without an adapter -> its default.
_WITHOUT_LORA = {"alpha": 0.0, "dropout": 0.05, "rslora": False, "targets": ["all-linear"]}


def _check_lora(values: Mapping[str, Any]) -> Iterable[str]:
    for name, off in _WITHOUT_LORA.items():
        got = values[f"lora.{name}"]
        got = list(got) if name == "targets" else got
        if got == off or values["lora.rank"]:
            continue
        if not values["lora.path"]:
            yield (
                f"lora.{name}: got {got!r}, but lora.rank=0 trains all weights, without an "
                f"adapter; allowed: {off!r}; set --config.lora.rank=64"
            )
        elif name != "dropout":
            yield (
                f"lora.{name}: got {got!r}, but the adapter of lora.path has its own; allowed: "
                f"{off!r}; leave it out"
            )
    if values["lora.path"] and values["lora.rank"]:
        yield (
            f"lora.rank: got {values['lora.rank']}, but the adapter of lora.path has a rank, alpha "
            "and targets of its own; allowed: 0, or a new adapter with lora.path=''"
        )
    if values["lora.base"] != "compute" and not (values["lora.rank"] or values["lora.path"]):
        yield (
            f"lora.base: got {values['lora.base']!r}, but without an adapter all weights are "
            "trained, and so cannot be quantized; allowed: 'compute'; set --config.lora.rank=64"
        )
    if values["lora.rank"] and not values["lora.targets"]:
        yield "lora.targets: got (), allowed: 'all-linear', or names of linear layers (q_proj)"


# Field that applies to fixed data alone -> (its default, why an online run does not use it).
_OFFLINE = {
    "data.n_examples": (0, "rounds.total_prompts bounds an online run"),
    "data.max_prompt_count": (0, "feedback.mode says which pairs an online run makes of a prompt"),
    "data.frac_unique_desirable": (1.0, "an online run trains on all of a round's feedback"),
    "data.frac_unique_undesirable": (1.0, "an online run trains on all of a round's feedback"),
}


def check_online(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each field that an online run does not use or that is too small."""
    for path, (unused, reason) in _OFFLINE.items():
        if values[path] != unused:
            yield f"{path}: got {values[path]}, allowed with task='online': {unused}; {reason}"
    yield from _check_round_sizes(values)
    yield from load("halos_jax.course.limits:check_guard")(values)
    feedback = FEEDBACK_TYPES[values["feedback.type"]]
    compares = feedback.compares and values.get("loss.name") not in feedback.single_losses
    yield from _check_refill(values)
    if values["sampling.num_samples_per_prompt"] == 1 and compares:
        yield (
            "sampling.num_samples_per_prompt: got 1, allowed: 2 or more, since "
            f"feedback.type={values['feedback.type']!r} compares the samples of a prompt"
        )


def _check_refill(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse further prompts for a round that cannot help, or that would change its rewards."""
    wanted, size = values["feedback.min_examples"], values["rounds.prompts_per_round"]
    per_round = values["rounds.max_prompts_per_round"] if size == "auto" else size
    if not wanted:
        return
    for path in _list_parts(values):
        if values[f"{path}.normalise"] == "file":
            yield (
                f"{path}.normalise: got 'file', allowed with feedback.min_examples={wanted}: "
                "'none' or 'prompt'; rewards that depend on all samples of a round would change "
                "with each of its further prompts"
            )
    spec, factor = FEEDBACK_TYPES[values["feedback.type"]], values["feedback.max_prompts_factor"]
    samples, mode = values["sampling.num_samples_per_prompt"], values["feedback.mode"]
    most = spec.count(int(per_round * factor), samples, mode) * (
        _count_per_pair(values) if spec.pairs else 1
    )
    if wanted > most:
        yield (
            f"feedback.min_examples: got {wanted}, but a round of {per_round} prompts x "
            f"feedback.max_prompts_factor={factor:g} prompts give {most} at most; lower it, or "
            "raise one of these"
        )


def _count_per_pair(values: Mapping[str, Any]) -> int:
    """Return how many examples of the loss a pair becomes; the most if the loss is a wrong one."""
    try:
        settings = {path[5:]: values[path] for path in values if path.startswith("loss.")}
        return ITEM_KINDS[load("halos_jax.losses:get_loss")(settings).items].per_pair
    except ValueError:
        return max(spec.per_pair for spec in ITEM_KINDS.values())


# Bound of the prompts of a round with "auto" -> its default.
_ROUND_SIZES = {"rounds.min_prompts_per_round": 128, "rounds.max_prompts_per_round": 1024}


def _check_round_sizes(values: Mapping[str, Any]) -> Iterable[str]:
    size = values["rounds.prompts_per_round"]
    low, high = (values[path] for path in _ROUND_SIZES)
    if size == "auto" and low > high:
        yield (
            f"rounds.min_prompts_per_round: got {low}, allowed: at most "
            f"rounds.max_prompts_per_round={high}; lower it, or raise the other"
        )
    for path, default in _ROUND_SIZES.items() if size != "auto" else ():
        if values[path] != default:
            yield (
                f"{path}: got {values[path]}, but every round has rounds.prompts_per_round={size} "
                f"prompts; allowed: {default}; set --config.rounds.prompts_per_round=auto"
            )


def _check_threshold(values: Mapping[str, Any]) -> Iterable[str]:
    threshold = values["feedback.threshold"]
    if FEEDBACK_TYPES[values["feedback.type"]].pairs and threshold != "auto":
        if isinstance(threshold, str):
            yield (
                f"feedback.threshold: got {threshold!r}, allowed: 'auto' or a number of 0 or more, "
                "the least difference of a pair's rewards; an average is for feedback.type='binary'"
            )
        elif threshold < 0:
            yield f"feedback.threshold: got {threshold}, allowed: 0 or more"


def _check_pairs(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse what only pairs have with other feedback, and weights that cannot have mean 1."""
    kind, most = values["feedback.type"], values["feedback.margin_weights"]
    for path in ("feedback.max_length_gap", "feedback.margin_weights"):
        if values[path] and not FEEDBACK_TYPES[kind].pairs:
            yield (
                f"{path}: got {values[path]:g}, allowed with feedback.type={kind!r}: 0; it has no "
                "pairs"
            )
    if 0 < most < 1:
        yield (
            f"feedback.margin_weights: got {most:g}, allowed: 0 (no weights), or 1 or more, the "
            "largest difference that counts, as a multiple of the mean difference"
        )


def _check_lengths(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse lengths that would cut a sample before it is scored or trained on."""
    longest = values["sampling.max_prompt_length"] + values["sampling.max_tokens"]
    uses = {"train.max_length": "trained"} if TASKS[values["task"]].trains else {}
    for path in [*(_list_parts(values) or ["reward"]), *list_scorers(values)]:
        if REWARD_KINDS[values[f"{path}.kind"]].by_tokens:
            uses[f"{path}.max_length"] = "scored"
    for path, use in uses.items():
        if longest > values[path]:
            yield (
                f"{path}: got {values[path]}, but sampling.max_prompt_length + "
                f"sampling.max_tokens = {longest}: a sample would be cut before it is {use}; "
                "raise the former or lower one of the latter"
            )


def _list_parts(values: Mapping[str, Any]) -> list[str]:
    """List the paths of the reward's parts."""
    found = [re.fullmatch(r"(reward\.parts\..*)\.weight", path) for path in values]
    return [match[1] for match in found if match]


def list_scorers(values: Mapping[str, Any]) -> list[str]:
    """List the paths of the scorers that the task uses."""
    found = [re.fullmatch(r"(eval\.scorers\.[^.]*)\.kind", path) for path in values]
    task = TASKS[values["task"]]
    is_used = bool(task.watches) and task.is_scored(values.__getitem__)
    return [match[1] for match in found if match and is_used]


def _check_held_out(values: Mapping[str, Any]) -> Iterable[str]:
    """Refuse held-out data that are given twice, or that the task would not use."""
    task, holdout = TASKS[values["task"]], values["data.holdout"]
    if task.trains and holdout:
        if values["data.eval"]:
            yield (
                f"data.holdout: got {holdout}, but data.eval={values['data.eval']!r} is held out "
                "too; allowed: one of them; set data.holdout to 0, or data.eval to ''"
            )
        for path, off in (("data.max_eval", 0), ("data.eval_split", "")):
            if values[path] != off:
                yield (
                    f"{path}: got {values[path]!r}, allowed with data.holdout: {off!r}; it is for "
                    "the records of data.eval, and data.holdout says how many prompts are held out"
                )
    if task.trains and values["data.test"] and not task.samples:
        yield (
            f"data.test: got {values['data.test']!r}, allowed with task={values['task']!r}: ''; it "
            "is for samples of task='online'; score a policy on it with task='eval' (data.eval)"
        )
    yield from _check_test(values)
    scorers = list_scorers(values)
    others = [name.rpartition(":")[2] for name in values["reward.rules"]]
    others += [path.removeprefix("reward.parts.") for path in _list_parts(values)]
    for path in scorers:
        name = path.removeprefix("eval.scorers.")
        if name in others or name in _TAKEN or not re.fullmatch(r"[\w-]+", name):
            yield (
                f"{path}: allowed: a name of letters, digits, '_' and '-' that no other metric "
                f"has (taken: {', '.join([*others, *_TAKEN])})"
            )
        yield from _check_judge(values, path)
        yield from _check_reward(values, path)
    if scorers and not any(values[path] for path in task.watches):
        yield (
            f"eval.scorers: got {', '.join(scorers)}, but there are no samples to score; set one "
            f"of {', '.join(task.watches)}"
        )


def _check_test(values: Mapping[str, Any]) -> Iterable[str]:
    heat, count = values["eval.test_temperature"], values["eval.test_samples"]
    if not isinstance(heat, str) and heat < 0:
        yield f"eval.test_temperature: got {heat}, allowed: 'auto', or a number of 0 or more"
    if heat == 0 and count > 1:
        yield (
            f"eval.test_samples: got {count}, allowed with eval.test_temperature=0: 0 or 1; greedy "
            "decoding gives the same answer every time"
        )


def _check_parts(values: Mapping[str, Any]) -> Iterable[str]:
    rules = {name.rpartition(":")[2] for name in values["reward.rules"]}
    for path in _list_parts(values):
        name = path.removeprefix("reward.parts.")
        if name in rules or name in _TAKEN:
            yield f"{path}: a metric has this name already; choose another"
        if not values[f"{path}.weight"]:
            yield f"{path}.weight: got 0, allowed: another number; or leave the part out"
        yield from _check_judge(values, path)
        if TASKS[values["task"]].is_scored(values.__getitem__):
            yield from _check_reward(values, path)


def _check_reward(values: Mapping[str, Any], path: str) -> Iterable[str]:
    kind = values[f"{path}.kind"]
    needs = REWARD_KINDS[kind].needs
    wanted = f"{path}.{needs}"
    if needs and not values[wanted]:
        yield f"{wanted}: got '', but {path}.kind={kind!r} needs it; set --config.{wanted}=..."


def _check_judge(values: Mapping[str, Any], path: str) -> Iterable[str]:
    variable, url = values[f"{path}.judge.key_variable"], values[f"{path}.judge.url"]
    if variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # The value may be the key itself, so the message does not show it.
        yield (
            f"{path}.judge.key_variable: got what is no name of an environment variable; allowed: "
            "the name of the one that holds the key, such as OPENAI_API_KEY, never the key"
        )
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url):
        yield (
            f"{path}.judge.url: got what is no plain address; allowed: http(s)://HOST[:PORT]/PATH, "
            "without a user, a password or a key in it (see reward.judge.key_variable)"
        )
    lowest, highest = values[f"{path}.judge.lowest"], values[f"{path}.judge.highest"]
    if not lowest < highest:
        yield f"{path}.judge.lowest: got {lowest}, allowed: less than .highest, which is {highest}"
