"""The order in which an online run takes its prompts: fixed at the start, extended by new prompts.

workdir/prompts.json    id and hash of each prompt in the order of the run: first those that it
                        was started with, then those added later, one group per addition;
                        under "held_out", of the prompts that `data.holdout` keeps out of it; and,
                        under "left_out", of those that a branch's start was trained on
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import Config, ConfigError
from halos_jax.data import datasets, holdout
from halos_jax.data.records import reading
from halos_jax.data.selection import select_train
from halos_jax.integers import divide_up
from halos_jax.policies.branch import Branch, find_branch
from halos_jax.storage import Note, WorkdirError, write_json_atomic
from halos_jax.types import Prompt
from halos_jax.workdir import manifests
from halos_jax.workdir.intact import PROMPTS

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Order:
    """The ordered prompts of a run.

    `groups` holds how many there were at the start and how many each later addition brought;
    `held_out` are the prompts of `data.train` that `data.holdout` keeps out of the order, and
    `left_out` (id and hash of each) those that the policy was trained on that a branch starts from.
    """

    prompts: list[Prompt]
    groups: tuple[int, ...]
    is_new: bool  # whether prompts.json does not hold this order yet
    held_out: list[Prompt] = dataclasses.field(default_factory=list)
    left_out: list[list[str]] = dataclasses.field(default_factory=list)

    @property
    def growth(self) -> dict[str, list[str]]:
        """How the prompts have grown since the last start, in the form of `begin_segment`."""
        if not self.is_new or len(self.groups) == 1:
            return {}
        before, after = sum(self.groups[:-1]), sum(self.groups)
        return {"data.train": [f"{before} prompts", f"{after} prompts"]}

    @property
    def at_start(self) -> int:
        """How many prompts the run was started with."""
        return self.groups[0]


def start_order(config: Config) -> Order:
    """Load the prompts of `data.train` in the order of a new run."""
    selection, held_out = select_train(config.data, config.seed), list[Prompt]()
    every = dataclasses.replace(selection, limit=0, holdout=0)
    prompts = datasets.load_prompts(config.data.train, every)
    if selection.holdout:
        prompts, held_out = holdout.split_prompts(prompts, selection.holdout)
    prompts = datasets.choose(prompts, selection.limit, selection.seed)
    left_out = _find_left_out(config)
    ordered = _leave_out(datasets.order_prompts(prompts, config.seed), left_out)
    _report_left_out(config, len(prompts), len(ordered))
    return Order(ordered, (len(ordered),), is_new=True, held_out=held_out, left_out=left_out)


def read_used(branch: Branch) -> list[list[str]]:
    """Return id and hash of each prompt that the policy of a branch's start was trained on.

    They are those of the other run's rounds up to that one, and those that it has left out itself.
    Of a run without rounds there are none, since its records are not prompts of an order.
    """
    path, round = branch.workdir / PROMPTS, branch.position.round or 0
    used = set()
    for one in range(1, round + 1):
        samples = manifests.round_folder(branch.workdir, one) / "samples.jsonl"
        for _, record in reading.read_records(samples, allow_empty=True):
            used.add(find_source_id(record["prompt_id"], record.get("prompt_pass", 1)))
    groups = _read(path)
    if used and groups is None:
        logger.warning(
            "branch.workdir: %s is missing, so the %d prompts that the policy was trained on are "
            "not known by their texts, and none is left out",
            path,
            len(used),
        )
    ordered = [entry for group in groups or [] for entry in group]
    return [*_read_left_out(branch.workdir), *(one for one in ordered if one[0] in used)]


def _find_left_out(config: Config) -> list[list[str]]:
    """Return what a run leaves out: as it has recorded it, or else as its branch says."""
    if not config.branch.workdir:
        return []
    workdir = Path(config.workdir)
    is_recorded = (workdir / PROMPTS).exists()
    return _read_left_out(workdir) if is_recorded else read_used(find_branch(config))


def _report_left_out(config: Config, count: int, left: int) -> None:
    """Say how many of `count` prompts a branch leaves out; refuse one that leaves none."""
    where, round = config.branch.workdir, config.branch.round or "the newest"
    if left == count:
        return
    if not left:
        more = "raise --config.data.max_train" if config.data.max_train else "add prompts"
        raise ConfigError(
            f"branch.workdir: got {where!r} with branch.round={round}, whose policy was trained on "
            f"all {count} prompts that data.train has for this run, and a branch leaves these out, "
            f"also with rounds.passes; allowed: data with prompts that it has not had; {more}, "
            "take an earlier --config.branch.round, or start without a branch from its export, "
            f"which leaves none out: --config.model.path={where} --config.branch.workdir=''"
        )
    logger.info(
        "branch.workdir: %d of %d prompts are left out: the policy was trained on them in %s",
        count - left,
        count,
        where,
    )


def _read_left_out(workdir: Path) -> list[list[str]]:
    return [entry for group in _read(workdir / PROMPTS, "left_out") or [] for entry in group]


def _leave_out(prompts: Sequence[Prompt], left_out: Sequence[Sequence[str]]) -> list[Prompt]:
    known = {tuple(entry) for entry in left_out}
    return [one for one in prompts if not known or (one.prompt_id, _hash(one)) not in known]


def load_order(config: Config, workdir: Path) -> Order:
    """Load the prompts of `data.train` in the order of the new or resumed run in `workdir`.

    Known prompts keep their order, and added ones are shuffled among themselves and appended. So
    the rounds that are done keep their prompts. The prompts that were held out at the start remain
    those that are.

    Raises:
      ConfigError: if a known prompt is gone or its text has changed.
    """
    known = _read(workdir / PROMPTS)
    if known is None:
        return start_order(config)
    selection = select_train(config.data, config.seed)
    # Apply a limit (`data.max_train`) by choosing among the new prompts: no known one may be lost.
    every = dataclasses.replace(selection, limit=0, holdout=0)
    found = datasets.load_prompts(config.data.train, every)
    by_id = {prompt.prompt_id: prompt for prompt in found}
    held = _read(workdir / PROMPTS, "held_out") or []
    _refuse_missing([entry for group in [*known, *held] for entry in group], by_id)
    held_out = [by_id[prompt_id] for group in held for prompt_id, _ in group]
    ids = {prompt_id for group in known for prompt_id, _ in group}
    left_out = _read_left_out(workdir)
    others = _leave_out(_leave_held_out(found, held_out), left_out)
    added = [prompt for prompt in others if prompt.prompt_id not in ids]
    if selection.limit:
        room = max(selection.limit - len(ids), 0)
        added = datasets.choose(added, room, selection.seed) if room else []
    groups = [[by_id[prompt_id] for prompt_id, _ in group] for group in known]
    if added:
        groups.append(datasets.order_prompts(added, config.seed))
    prompts = [prompt for group in groups for prompt in group]
    sizes = tuple(map(len, groups))
    return Order(prompts, sizes, is_new=bool(added), held_out=held_out, left_out=left_out)


def _leave_held_out(found: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that are not held out; say how many added ones equal one that is."""
    held, ids = set(map(holdout.make_key, held_out)), {one.prompt_id for one in held_out}
    again = [one for one in found if one.prompt_id not in ids and holdout.make_key(one) in held]
    if held and again:
        logger.warning(
            "data.train: %d added prompts repeat one that is held out, under another id (the "
            "first is %s): they are left out",
            len(again),
            again[0].prompt_id,
        )
    return [one for one in found if holdout.make_key(one) not in held] if held else list(found)


def spread_passes(prompts: list[Prompt], config: Config, needed: int) -> list[Prompt]:
    """Return the order of a run over `rounds.passes`, as far as the first `needed` prompts reach.

    A pass has every prompt once, each time in another order and with an id of that pass, so that
    its samples are others. The first pass is `prompts` themselves.

    Raises:
      ConfigError: if a prompt of the data has the id that another one gets in a later pass.
    """
    ids, every = {one.prompt_id for one in prompts}, list(prompts)
    most = min(config.rounds.passes, divide_up(needed, max(len(prompts), 1)))
    for number in range(2, most + 1):
        again = [_take_again(one, number) for one in prompts]
        for known, one in zip(prompts, again, strict=True):
            if one.prompt_id in ids:
                raise ConfigError(
                    f"rounds.passes: got {config.rounds.passes}, but {one.prompt_id!r}, the id "
                    f"that prompt {known.prompt_id!r} gets in pass {number}, is that of another "
                    "prompt; rename one of them, or leave 'prompt_id' out of the records"
                )
        every += datasets.order_prompts(again, config.seed)
    return every


def _take_again(prompt: Prompt, number: int) -> Prompt:
    again = f"{prompt.prompt_id}#{number}"
    return dataclasses.replace(prompt, prompt_id=again, pass_number=number)


def find_source_id(prompt_id: str, pass_number: int) -> str:
    """Return the id in the data of a prompt that a pass has under `prompt_id`."""
    return prompt_id.removesuffix(f"#{pass_number}") if pass_number > 1 else prompt_id


def refuse_late(order: Order, prompts: Sequence[Prompt], used: int) -> None:
    """Raise ConfigError if prompts were added once the second pass has begun.

    Args:
      prompts: those of the order that can be used.
      used: where in the order of all passes the rounds that have begun end.
    """
    added = {one.prompt_id for one in order.prompts[sum(order.groups[:-1]) :]}
    before = sum(one.prompt_id not in added for one in prompts)
    if order.growth and used > before:
        raise ConfigError(
            f"data.train: {len(added)} prompts were added to the {before} that the run had, but it "
            "is beyond its first pass over them (rounds.passes), and all passes have the same "
            "prompts; take them out, or start a new run with --config.workdir=DIR"
        )


def save_order(order: Order, workdir: Path, note: Note | None = None) -> None:
    """Write prompts.json, unless it holds this order already."""
    if not order.is_new:
        return
    groups, start = [], 0
    for size in order.groups:
        groups.append(_to_entries(order.prompts[start : start + size]))
        start += size
    held = {"held_out": [_to_entries(order.held_out)]} if order.held_out else {}
    left = {"left_out": [order.left_out]} if order.left_out else {}
    write_json_atomic(workdir / PROMPTS, {"groups": groups, **held, **left}, note=note)


def warn_of_trained(order: Order, prompts: Sequence[Prompt]) -> None:
    """Warn of held-out or test prompts that the start of a branch was trained on."""
    kept = len(_leave_out(prompts, order.left_out))
    if kept < len(prompts):
        logger.warning(
            "branch.workdir: the policy was trained on %d of the %d held-out and test prompts in "
            "the run that it comes from: their rewards flatter it",
            len(prompts) - kept,
            len(prompts),
        )


def count_known(workdir: Path) -> int | None:
    """Return how many prompts the order of the run in `workdir` has; None if there is none yet."""
    known = _read(workdir / PROMPTS)
    return None if known is None else sum(map(len, known))


def _to_entries(prompts: Sequence[Prompt]) -> list[list[str]]:
    return [[prompt.prompt_id, _hash(prompt)] for prompt in prompts]


def _read(path: Path, name: str = "groups") -> list[list[list[str]]] | None:
    """Return the groups of prompts under `name` in prompts.json; None if there is no such file."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        groups: Any = plain["groups"] if name == "groups" else plain.get(name, [])
        return [[[str(prompt_id), str(sha)] for prompt_id, sha in group] for group in groups]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise WorkdirError(
            f"{path} is not as the run wrote it ({type(error).__name__}: {error}); put the "
            "original file back, or start a new run with --config.workdir=DIR"
        ) from error


def _hash(prompt: Prompt) -> str:
    return datasets.identify_prompts([prompt])[:16]


def _refuse_missing(known: Sequence[Sequence[str]], by_id: dict[str, Prompt]) -> None:
    gone = [prompt_id for prompt_id, _ in known if prompt_id not in by_id]
    changed = [
        prompt_id
        for prompt_id, sha in known
        if prompt_id in by_id and _hash(by_id[prompt_id]) != sha
    ]
    wrong = [
        f"{len(ids)} {what} (the first is {ids[0]})"
        for ids, what in ((gone, "are gone"), (changed, "have another text"))
        if ids
    ]
    if wrong:
        raise ConfigError(
            f"data.train: of the {len(known)} prompts that the run was started with "
            f"{' and '.join(wrong)}; allowed: the same prompts, in any order, and more of them; "
            "put the data back as they were, or start a new run with --config.workdir=DIR"
        )
