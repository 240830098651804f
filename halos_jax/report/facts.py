"""What a page says of a run in words and tables: its state, rounds, config, how to repeat it."""

import dataclasses
import datetime
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import Config, schema
from halos_jax.config.tasks import TASKS
from halos_jax.course.advice import list_new_hints
from halos_jax.course.best import read_best, read_number
from halos_jax.course.verdicts import describe_verdict, read_verdict
from halos_jax.report.recorded import Recorded
from halos_jax.report.round_charts import first_known, list_scorers
from halos_jax.workdir.manifests import Manifest

_NONE = "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table of rounds: its header, what it holds, a text for each round."""

    name: str
    about: str
    cells: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Remark:
    """A line of what the run has said: `level` is "advice", "guard", "warning" or "change"."""

    level: str
    where: str
    text: str


def describe_state(run: Recorded) -> str:
    """Return how far the run is: "complete", "in round 3 of 16, stage train"."""
    if run.rounds and read_verdict(run.rounds[-1]).action == "stop":
        return f"ended by the guard after round {run.rounds[-1].round}"
    if run.is_complete:
        return "complete"
    if run.task is not None:
        return f"under way, or stopped: next stage {run.task.next_stage}"
    if not run.rounds:
        step = run.metrics[-1]["step"] if run.metrics else 0
        return f"under way, or stopped, after step {step}"
    last = run.rounds[-1]
    total = _count_rounds(run)
    of = f" of {total}" if total else ""
    if last.next_stage is None:
        return f"under way, or stopped, after round {last.round}{of}"
    return f"under way, or stopped, in round {last.round}{of}, stage {last.next_stage}"


def _count_rounds(run: Recorded) -> int | None:
    sizes = run.plain.get("rounds", {})
    each, total = sizes.get("prompts_per_round"), sizes.get("total_prompts")
    if not isinstance(each, int) or not isinstance(total, int) or each < 1:
        return None
    return -(-total // each)


def list_facts(run: Recorded) -> list[tuple[str, str]]:
    """Return what identifies the run: (name, value), those that are known."""
    plain = run.plain
    task = TASKS.get(plain.get("task", ""))
    loss = dict(plain.get("loss", {}))
    name = loss.pop("name", "")
    if task is not None and task.loss not in ("", name):
        name, loss = task.loss, {}  # the config's is for another stage of a pipeline
    arguments = ", ".join(f"{key} {value}" for key, value in loss.items())
    train, rounds, sampling = (plain.get(one, {}) for one in ("train", "rounds", "sampling"))
    facts = {
        "task": plain.get("task", ""),
        "model": plain.get("model", {}).get("path", ""),
        "reward": _name_reward(plain) if run.rounds else "",
        "data": plain.get("data", {}).get("train", "") or plain.get("data", {}).get("eval", ""),
        "loss": f"{name} ({arguments})" if arguments else str(name),
        "learning rate": f"{plain.get('optimizer', {}).get('learning_rate', '')}",
        "batch": f"{train.get('batch_size', '')}",
        "seed": f"{plain.get('seed', '')}",
    }
    if run.rounds:
        facts["rounds"] = (
            f"{rounds.get('total_prompts')} prompts, {rounds.get('prompts_per_round')} a round, "
            f"{sampling.get('num_samples_per_prompt')} samples each{_name_passes(rounds)}"
        )
    return [(key, str(value)) for key, value in facts.items() if value not in ("", None)]


def _name_passes(rounds: Mapping[str, Any]) -> str:
    """Say in how many passes at most a run has its prompts, if in several."""
    most = rounds.get("passes", 1)
    return f", in at most {most} passes" if most != 1 else ""


def _name_reward(plain: Mapping[str, Any]) -> str:
    reward = plain.get("reward", {})
    parts = list(reward.get("parts", {}))
    named = {
        "model": reward.get("path"),
        "function": reward.get("function"),
        "judge": reward.get("judge", {}).get("model"),
    }
    return " + ".join(parts) or str(named.get(reward.get("kind")) or reward.get("kind") or "")


# --------------------------------------------------------------------------- the table of rounds


def list_columns(run: Recorded) -> list[Column]:
    """Return the columns of the table of rounds that any round has a value for."""
    rounds = run.rounds
    seconds = _sum_times(run)
    found = [
        Column(name, about, tuple(read(one) for one in rounds))
        for name, about, read in _choose_readers(rounds, seconds)
    ]
    return [
        dataclasses.replace(one, cells=tuple(cell or _NONE for cell in one.cells))
        for one in found
        if any(one.cells)
    ]


_Read = Callable[[Manifest], str]


def _choose_readers(
    rounds: Sequence[Manifest], seconds: Mapping[int, float]
) -> list[tuple[str, str, _Read]]:
    kl = first_known(rounds, "kl_sft", "kl_sampled")
    stale = first_known(rounds, "kl_stale", "kl_sampled_stale")
    tokens = first_known(rounds, "response_tokens_eval", "response_tokens_mean")
    scorers = [
        (one, "mean held-out score by this part or scorer", _estimate(f"reward_eval/{one}"))
        for one in list_scorers(rounds)
    ]
    return [
        ("round", "0 is the policy that the run starts from", lambda one: str(one.round)),
        ("prompts", "prompts sampled from", _count_prompts),
        ("pass", "over the data, of its prompts, mean", _number("prompt_pass", ".3g")),
        ("pairs", "examples of its feedback", _count_examples),
        (
            "replayed",
            "examples of earlier rounds beside them",
            _number("feedback_replayed", ".0f"),
        ),
        ("held-out reward", "mean over held-out prompts, ± 95 %", _estimate("reward_eval")),
        ("win rate", "against SFT, of held-out samples", _number("win_rate_eval", ".0%")),
        *scorers,
        ("test reward", "mean over test prompts, ± 95 %", _estimate("reward_test")),
        (
            "KL",
            "from SFT, nats a response, of the policy that sampled the round",
            _number(kl, "z.2f"),
        ),
        ("margin", "of fresh pairs, before training on them", _number("fresh_margin", "+z.3f")),
        ("ties", "prompts whose samples have the same reward", _number("tied_share", ".0%")),
        ("cut", "samples cut by the token limit", _number("truncated_share", ".0%")),
        ("tokens", "mean length of a response", _number(tokens, ".0f")),
        ("moved", "KL of the round's own training, nats a response", _number(stale, "z.2f")),
        ("time", "of its stages", lambda one: show_seconds(seconds.get(one.round))),
        ("note", "what was decided at its end", lambda one: _note(one, rounds)),
    ]


def _number(name: str, form: str) -> _Read:
    def read(one: Manifest) -> str:
        value = read_number(one, name)
        return "" if value is None else format(value, form)

    return read


def _estimate(name: str) -> _Read:
    def read(one: Manifest) -> str:
        value = read_number(one, name)
        low, high = (read_number(one, f"{name}/{end}") for end in ("low", "high"))
        if value is None:
            return ""
        if low is None or high is None:
            return f"{value:.3f}"
        return f"{value:.3f} ±{(high - low) / 2:.3f}"

    return read


def _count_prompts(one: Manifest) -> str:
    return str(one.stop - one.start) if one.round else ""


def _count_examples(one: Manifest) -> str:
    counts = [read_number(one, f"feedback_{name}") for name in ("pairs", "examples")]
    known = [value for value in counts if value is not None]
    return f"{sum(known):.0f}" if known and one.round else ""


def _note(one: Manifest, rounds: Sequence[Manifest]) -> str:
    best, verdict = read_best(rounds[-1]), read_verdict(one)
    notes = []
    if one.origin:
        notes.append(f"branch of {_name_origin(one.origin)}")
    if best is not None and best.of > 1 and best.round == one.round:
        notes.append("best")
    if verdict.action == "retry":
        notes.append(f"back to {verdict.to or 'SFT'}")
    elif verdict.action != "none":
        notes.append(f"guard: {verdict.action}")
    return ", ".join(notes)


def _sum_times(run: Recorded) -> dict[int, float]:
    totals: dict[int, float] = {}
    for one in run.times:
        totals[one["round"]] = totals.get(one["round"], 0.0) + one["end"] - one["start"]
    return totals


def show_seconds(seconds: float | None) -> str:
    """Return a time in the unit that suits it; "" for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# --------------------------------------------------------------------------- what was said


def list_remarks(run: Recorded) -> list[Remark]:
    """Return the guard's verdicts, the advice, the changes and the warnings, newest first."""
    found = []
    signs = run.list_signs()
    hints = list_new_hints(run.config, signs) if run.config is not None and signs else []
    for one, new in zip(signs, hints, strict=False):
        found += [Remark("advice", f"round {one.round}", hint.text) for hint in new]
    for manifest in run.rounds:
        verdict = read_verdict(manifest)
        if verdict.action != "none":
            text = describe_verdict(verdict, manifest.round)
            found.append(Remark("guard", f"round {manifest.round}", text))
    for segment in run.history.segments if run.history is not None else ():
        changed = "; ".join(
            f"{path}: {old!r} -> {new!r}" for path, (old, new) in segment["changed"].items()
        )
        place = f"round {segment['round']}" if "round" in segment else "resumed"
        found.append(Remark("change", place, changed))
    found += [Remark("problem", "this page", line) for line in run.problems]
    found += [
        Remark("warning", show_time(one.get("time")), str(one.get("text")))
        for one in run.journal.warnings
    ]
    return found[::-1]


def show_time(seconds: Any) -> str:
    """Return a time since 1970 as "2026-11-26 14:00 UTC"; "" for anything else."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return ""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.strftime("%Y-%m-%d %H:%M UTC")


# --------------------------------------------------------------------------- how to repeat it


def list_config(run: Recorded) -> list[tuple[str, str, bool]]:
    """Return (field, value, whether it is the default) for every field, changed ones first."""
    defaults = dict(schema.flatten(schema.to_plain(Config())))
    rows = [
        (path, _show_value(value), path in defaults and defaults[path] == value)
        for path, value in schema.flatten(run.plain)
    ]
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _show_value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) and value else repr(value)


def list_environment(run: Recorded) -> list[tuple[str, str]]:
    """Return what the newest start of the run was made with: (name, value)."""
    rows = [
        (path.removeprefix("versions."), _show_value(value))
        for path, value in schema.flatten(run.execution)
        if path.partition(".")[0] not in ("settings", "switches")
    ]
    starts = run.journal.starts
    if starts:
        rows += [("starts", f"{len(starts)}, the last {show_time(starts[-1].get('time'))}")]
    return rows


def list_commands(run: Recorded) -> list[tuple[str, str]]:
    """Return (what it does, the command) for repeating, resuming and checking the run."""
    config = shlex.quote(f"{run.workdir}/config.json")
    found = []
    if run.journal.starts and "command" in run.journal.starts[-1]:
        what = "Carry on, or repeat with another --config.workdir: the last start"
        found.append((what, str(run.journal.starts[-1]["command"])))
    again = f"python -m halos_jax.main --config={config} --config.workdir=NEW_FOLDER"
    page = f"python -m halos_jax.main --config={config} --config.mode=report"
    return [*found, ("The same run in another folder", again), ("This page again", page)]


def _name_origin(origin: Mapping[str, Any]) -> str:
    """Name the round that a branch starts from, without the folders that its run is in."""
    name = Path(str(origin["workdir"])).name
    return f"round {origin['round']} of {name}" if origin["round"] else f"the end of {name}"
