"""The table of samples that trackers show for each evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_jax.trackers.points import Samples

FILE = "eval.jsonl"  # the scored held-out samples of a round
COLUMNS = ("prompt", "response", "reward")
_LONGEST = 2000  # characters of a prompt or response; longer ones are cut in the middle


def read_samples(workdir: Path, values: Mapping[str, float], most: int) -> Samples | None:
    """Return the first held-out samples of the round that metrics evaluate; None if there are none.

    Args:
      values: a line of metrics.jsonl.
      most: the number of rows; 0: no table.
    """
    if not most or "reward_eval" not in values or "round" not in values:
        return None
    path = workdir / "rounds" / f"{int(values['round']):04d}" / FILE
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as lines:
        rows = [_make_row(json.loads(line)) for _, line in zip(range(most), lines)]
    return Samples(COLUMNS, tuple(rows))


def _make_row(record: Mapping[str, Any]) -> tuple[str, str, float | None]:
    turns = [f"{turn['role']}: {turn['content']}" for turn in record["prompt"]]
    return shorten("\n".join(turns)), shorten(record["output"]), record.get("reward")


def shorten(text: str) -> str:
    """Return a text; of a long one, the two ends and how many characters lie between them."""
    left_out = len(text) - _LONGEST
    if left_out <= 0:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
