"""The order in which an online run takes its prompts: fixed at the start, extended by new prompts.

workdir/prompts.json    id and hash of each prompt in the order of the run: first those that it
                        was started with, then those added later, one group per addition
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halos_jax.config import Config, ConfigError
from halos_jax.data import datasets
from halos_jax.storage import Note, WorkdirError, write_json_atomic
from halos_jax.types import Prompt
from halos_jax.workdir.intact import PROMPTS


@dataclasses.dataclass(frozen=True)
class Order:
    """The ordered prompts of a run.

    `groups` holds how many there were at the start and how many each later addition brought.
    """

    prompts: list[Prompt]
    groups: tuple[int, ...]
    is_new: bool  # whether prompts.json does not hold this order yet

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


def load_order(config: Config, workdir: Path) -> Order:
    """Load the prompts of `data.train` in the order of the new or resumed run in `workdir`.

    Known prompts keep their order, and added ones are shuffled among themselves and appended. So
    the rounds that are done keep their prompts.

    Raises:
      ConfigError: if a known prompt is gone or its text has changed.
    """
    selection = datasets.select_train(config.data, config.seed)
    known = _read(workdir / PROMPTS)
    if known is None:
        prompts = datasets.load_prompts(config.data.train, selection)
        return Order(datasets.order_prompts(prompts, config.seed), (len(prompts),), is_new=True)
    # Apply a limit (`data.max_train`) by choosing among the new prompts: no known one may be lost.
    found = datasets.load_prompts(config.data.train, dataclasses.replace(selection, limit=0))
    by_id = {prompt.prompt_id: prompt for prompt in found}
    ids = {prompt_id for group in known for prompt_id, _ in group}
    _refuse_missing([entry for group in known for entry in group], by_id)
    added = [prompt for prompt in found if prompt.prompt_id not in ids]
    if selection.limit:
        room = max(selection.limit - len(ids), 0)
        added = datasets.choose(added, room, selection.seed) if room else []
    groups = [[by_id[prompt_id] for prompt_id, _ in group] for group in known]
    if added:
        groups.append(datasets.order_prompts(added, config.seed))
    prompts = [prompt for group in groups for prompt in group]
    return Order(prompts, tuple(map(len, groups)), is_new=bool(added))


def save_order(order: Order, workdir: Path, note: Note | None = None) -> None:
    """Write prompts.json, unless it holds this order already."""
    if not order.is_new:
        return
    groups, start = [], 0
    for size in order.groups:
        part = order.prompts[start : start + size]
        groups.append([[prompt.prompt_id, _hash(prompt)] for prompt in part])
        start += size
    write_json_atomic(workdir / PROMPTS, {"groups": groups}, note=note)


def count_known(workdir: Path) -> int | None:
    """Return how many prompts the order of the run in `workdir` has; None if there is none yet."""
    known = _read(workdir / PROMPTS)
    return None if known is None else sum(map(len, known))


def _read(path: Path) -> list[list[list[str]]] | None:
    try:
        groups: Any = json.loads(path.read_text(encoding="utf-8"))["groups"]
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
