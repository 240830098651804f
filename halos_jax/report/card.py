"""The model card of an export: a README.md that a run writes from what it has recorded.

The metadata at its top are those of the Hugging Face Hub. Text of models, names of data and paths
are data in it: one line of inline code, or JSON in a block, so that nothing of it is Markdown,
HTML or YAML. Of paths of this machine the last part alone is told.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from halos_jax.config import Config, roles, schema
from halos_jax.config.tasks import TASKS
from halos_jax.course.best import read_best
from halos_jax.report.facts import list_columns, list_environment
from halos_jax.report.lineage import Lineage, find_sets, name_place, trace
from halos_jax.report.recorded import Recorded
from halos_jax.report.samples import spread
from halos_jax.rounds.outcome.decisions import keeps_best
from halos_jax.workdir.seals import certificate

FILE = "README.md"
_MARK = re.compile(r"<!-- written by halos_jax: ([0-9a-f]{16}) -->\n?")
_LONGEST = 300  # characters of a value in a line
_ROWS = 16  # of the curve
_ASIDE = ("time", "cut")  # columns of the page about a run that say nothing of the model
_STEPS = ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "loss/train")


def make_card(run: Recorded, folder: Path, *, license: str = "", what: str = "") -> str:
    """Return the card of the model in `folder`, which a run has exported.

    Args:
      license: the licence that the metadata name; "": none, and the card says so.
      what: which policy of the run it is; "": the one that the run leaves at its end.
    """
    lineage, task = trace(run.plain), run.plain.get("task", "")
    is_scorer = task in TASKS and TASKS[task].policy == "classifier"
    data = ModelCardData(
        base_model=lineage.base_id or None,
        datasets=find_sets(run.plain) or None,
        library_name="transformers",
        license=license or None,
        pipeline_tag="text-classification" if is_scorer else "text-generation",
        tags=_list_tags(run.plain),
    )
    body = [
        f"# {_make_title(run, lineage)}",
        f"{_describe_origin(lineage, run.plain)} {what or _describe_end(run)}",
        "## How it was made",
        _format_rows([("", ""), *_list_facts(run, lineage)]),
        *_describe_curve(run),
        "## Recipe",
        "Fields that differ from their defaults, which decide what is computed:",
        _format_block(_list_recipe(run)),
        "## Made with",
        _format_rows([("", ""), *_list_environment(run)]),
        "## Licence",
        _describe_license(license),
    ]
    found = certificate.read_certificate(folder / certificate.FILE)
    if found is not None:
        body += ["## Certificate", certificate.describe_certificate(found)]
    return _finish(data, body)


def make_adapter_card(run: Recorded, *, license: str = "") -> str:
    """Return the card of the adapter beside an exported model, in PEFT's format."""
    lineage, lora = trace(run.plain), run.plain.get("lora", {})
    data = ModelCardData(
        base_model=lineage.start_id or None,
        base_model_relation="adapter" if lineage.start_id else None,
        datasets=find_sets(run.plain) or None,
        library_name="peft",
        license=license or None,
        tags=[*_list_tags(run.plain), "lora"],
    )
    body = [
        f"# {_make_title(run, lineage)}, adapter",
        f"A LoRA adapter of {quote(lineage.start)}, of rank {quote(lora.get('rank'))}. The card "
        "in the folder above says how it was made; the model there has the adapter merged in.",
        "## Licence",
        _describe_license(license),
    ]
    return _finish(data, body)


def is_own(text: str) -> bool:
    """Tell whether a card is as `make_card` wrote it; what it says of a certificate may change."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(_MARK.sub("", text))


def quote(value: object) -> str:
    """Return a value as inline code of one line, in which nothing is Markdown, HTML or YAML.

    In a table a backslash before a bar would end the cell, so that a space parts the two.

    >>> quote("a`b | <c>")
    '``a`b \\\\| <c>``'
    """
    text = " ".join("".join(one if one.isprintable() else " " for one in str(value)).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    runs = re.findall("`+", text)
    fence = "`" * (1 + max(map(len, runs), default=0))
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}".replace("\\|", "\\ |").replace("|", "\\|")


# --------------------------------------------------------------------------- the parts


def _finish(data: ModelCardData, body: Sequence[str]) -> str:
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))
    return f"{text}\n<!-- written by halos_jax: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    """Return a hash of a card without the paragraph about a certificate, and without spaces."""
    plain = "".join("".join(certificate.split_card(text)).split())
    return hashlib.sha256(plain.encode(errors="replace")).hexdigest()[:16]


def _make_title(run: Recorded, lineage: Lineage) -> str:
    """Return a title that does not depend on the folder: the same run makes the same card."""
    return ", ".join(map(quote, (lineage.base or "model", *_list_tags(run.plain)[1:])))


def _trains(plain: Mapping[str, Any]) -> bool:
    task = plain.get("task", "")
    return task in TASKS and TASKS[task].trains


def _list_tags(plain: Mapping[str, Any]) -> list[str]:
    task = plain.get("task", "")
    loss = TASKS[task].loss if task in TASKS else ""
    named = (loss or plain.get("loss", {}).get("name", "")) if _trains(plain) else ""
    names = [re.sub(r"[^\w.-]+", "-", str(one))[:40] for one in (task, named) if one]
    return ["halos_jax", *dict.fromkeys(names)]


def _describe_origin(lineage: Lineage, plain: Mapping[str, Any]) -> str:
    made = "made with halos_jax (iterative alignment of language models in JAX)"
    if lineage.is_drawn:
        return f"A model {made}, from new weights of the architecture of {quote(lineage.base)}."
    through = "".join(f", through the run {quote(one)}" for one in lineage.runs)
    if branch := plain.get("branch", {}).get("workdir"):
        through += f", going on from a policy of the run {quote(name_place(branch))}"
    return f"A model {made}, from {quote(lineage.base)}{through}."


def _describe_end(run: Recorded) -> str:
    """Say which policy of the run is exported."""
    last, config = (run.rounds[-1] if run.rounds else None), run.config
    best = read_best(last)
    if last is None or config is None:
        return "It is the model at the end of the training." if _trains(run.plain) else ""
    if best is not None and best.reward is not None and keeps_best(config, is_evaluated=True):
        which = f"round {best.round}" if best.round else "round 0, the start"
        return (
            f"It is the policy of {which}: the highest held-out reward of {best.of} "
            "evaluated rounds. The best of several noisy rounds is flattered."
        )
    return f"It is the policy of round {last.round}, the last."


def _list_facts(run: Recorded, lineage: Lineage) -> list[tuple[str, str]]:
    plain = run.plain
    task = TASKS.get(plain.get("task", ""))
    loss = dict(plain.get("loss", {}))
    if task is not None and task.loss not in ("", loss.get("name")):
        loss = {"name": task.loss}
    train, optimizer, lora = (plain.get(one, {}) for one in ("train", "optimizer", "lora"))
    rate, schedule = optimizer.get("learning_rate"), optimizer.get("schedule")
    data = plain.get("data", {})
    facts: list[tuple[str, Any]] = [
        ("task", f"{plain.get('task')}: {task.summary}" if task is not None else ""),
        ("start", lineage.start),
        ("seed", plain.get("seed")),
    ]
    trained: list[tuple[str, Any]] = [
        ("loss", ", ".join(f"{name}={value}" for name, value in loss.items())),
        ("data", ", ".join(map(name_place, _split(data.get("train", ""))))),
        ("held out", ", ".join(map(name_place, _split(data.get("eval", ""))))),
        ("optimizer", f"{optimizer.get('name')}, learning rate {rate} ({schedule})"),
        ("batch", f"{train.get('batch_size')} examples a step; epochs: {train.get('epochs')}"),
        ("adapter", f"LoRA of rank {lora['rank']}" if lora.get("rank") else ""),
        ("reference model", name_place(plain.get("model", {}).get("reference", ""))),
    ]
    facts += trained if _trains(plain) else []
    if run.rounds:
        facts += _list_round_facts(plain)
    return [(name, quote(value)) for name, value in facts if value not in ("", None)]


def _list_round_facts(plain: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rounds, sampling, reward = (plain.get(one, {}) for one in ("rounds", "sampling", "reward"))
    named = [reward.get("function"), name_place(reward.get("path", "")), plain["reward"]["kind"]]
    parts = ", ".join(reward.get("parts", {}))
    count = f"{sampling.get('num_samples_per_prompt')} samples a prompt"
    return [
        ("reward", parts or next(filter(None, named), "")),
        ("reference", rounds.get("reference")),
        (
            "budget",
            f"{rounds.get('total_prompts')} prompts, {rounds.get('prompts_per_round')} "
            f"a round, {count}",
        ),
        (
            "sampling",
            f"temperature {sampling.get('temperature')}, top-p {sampling.get('top_p')}, "
            f"at most {sampling.get('max_tokens')} tokens",
        ),
    ]


def _list_environment(run: Recorded) -> list[tuple[str, str]]:
    rows = list_environment(run)
    return [(name, quote(value)) for name, value in rows if name != "starts"]


def _split(source: str) -> list[str]:
    return [one.strip() for one in source.split(",") if one.strip()]


def _list_recipe(run: Recorded) -> dict[str, Any]:
    """Return the fields with a say in what is computed that differ from their defaults."""
    defaults = dict(schema.flatten(schema.to_plain(Config())))
    found = {}
    for path, value in schema.flatten(run.plain):
        mark = roles.find_mark(Config, path)
        if mark.role_in(run.plain.get("task", "")) == "aside" or value == defaults.get(path):
            continue
        if mark.place and isinstance(value, str):
            value = ", ".join(map(name_place, _split(value)))
        found[path] = value
    return dict(sorted(found.items()))


def _describe_license(license: str) -> str:
    if license:
        return f"As chosen by who made it: {quote(license)}."
    return (
        "Not chosen yet. Those of the base model and of the data bind; add `license:` to the "
        "metadata at the top of this file (or set `export.license`)."
    )


# --------------------------------------------------------------------------- the curve


def _describe_curve(run: Recorded) -> Iterator[str]:
    rows = _list_rounds(run) if run.rounds else _list_steps(run)
    if len(rows) > 2:
        yield "## Curve"
        kept = spread(len(rows) - 1, _ROWS, ())
        if len(kept) < len(rows) - 1:
            yield f"{len(kept)} of {len(rows) - 1} rows, evenly."
        yield _format_rows([rows[0], *(rows[1 + index] for index in kept)])


def _list_rounds(run: Recorded) -> list[tuple[str, ...]]:
    columns = [one for one in list_columns(run) if one.name not in _ASIDE]
    names = tuple(quote(one.name) for one in columns)
    return [names, *(tuple(map(_escape, row)) for row in zip(*(one.cells for one in columns)))]


def _list_steps(run: Recorded) -> list[tuple[str, ...]]:
    """Return the evaluations of a training; without any, its steps."""
    is_held_out = any("loss/eval" in one for one in run.metrics)
    wanted = "loss/eval" if is_held_out else "loss/train"
    rows = [one for one in run.metrics if wanted in one]
    names = [name for name in _STEPS if any(name in one for one in rows)]
    cells = [
        (str(one["step"]), *(f"{one[name]:.4g}" if name in one else "" for name in names))
        for one in rows
    ]
    return [("step", *map(quote, names)), *cells]


# --------------------------------------------------------------------------- Markdown


def _format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are safe; the first row has the names of its columns."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _format_block(value: object) -> str:
    """Return JSON in a block; in ASCII, without any backtick, `<` or line of a text's own."""
    text = json.dumps(value, indent=2).replace("`", "\\u0060").replace("<", "\\u003c")
    return f"```json\n{text}\n```"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", " ".join(text.split()))
