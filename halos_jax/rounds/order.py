"""The order in which an online run takes its prompts: fixed at its start, longer when more come.

workdir/prompts.json    id and hash of each prompt, in the order of the run: those of the start,
                        and behind them, group by group, those that have come since
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
    """The prompts of a run; `groups` says how many came with the start and each time since."""

    prompts: list[Prompt]
    groups: tuple[int, ...]
    is_new: bool  # not yet what the file says

    @property
    def growth(self) -> dict[str, list[str]]:
        """What has come since the start before, as `states.begin_segment` takes it."""
        if not self.is_new or len(self.groups) == 1:
            return {}
        before, after = sum(self.groups[:-1]), sum(self.groups)
        return {"data.train": [f"{before} prompts", f"{after} prompts"]}

    @property
    def at_start(self) -> int:
        """How many prompts the run was started with."""
        return self.groups[0]


def load_order(config: Config, workdir: Path) -> Order:
    """Load the prompts of `data.train` in the order of the run in `workdir`, new or under way.

    The order of those that the run has known stays, and what has been added comes behind it, in an
    order of its own: so the rounds that are done have the prompts that they have had.

    Raises:
      ConfigError: where a prompt that the run has known is gone or has another text.
    """
    selection = datasets.select_train(config.data, config.seed)
    known = _read(workdir / PROMPTS)
    if known is None:
        prompts = datasets.load_prompts(config.data.train, selection)
        return Order(datasets.order_prompts(prompts, config.seed), (len(prompts),), is_new=True)
    # A limit is kept by choosing among those that are new, not by losing some that are known.
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
    """Write the order down, if the file does not say it already."""
    if not order.is_new:
        return
    groups, start = [], 0
    for size in order.groups:
        part = order.prompts[start : start + size]
        groups.append([[prompt.prompt_id, _hash(prompt)] for prompt in part])
        start += size
    write_json_atomic(workdir / PROMPTS, {"groups": groups}, note=note)


def count_known(workdir: Path) -> int | None:
    """Return how many prompts the run in `workdir` has known; None where it has none yet."""
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
