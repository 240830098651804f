"""The table of rounds: what came of each of them, read from the manifests and the timings."""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from halos_jax.config import ConfigError
from halos_jax.console.table import Column, format_table, show_estimate
from halos_jax.console.values import WIDTH
from halos_jax.workdir import changes, manifests
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.timing import read_times


class Row(NamedTuple):
    """A round of the table.

    `steps` is None where it is not known. `times` maps a stage that is timed to its seconds.
    """

    manifest: Manifest
    steps: int | None
    times: Mapping[str, float]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.metrics

    @property
    def is_done(self) -> bool:
        return self.manifest.next_stage is None

    @property
    def prompts(self) -> int:
        return self.manifest.stop - self.manifest.start

    @property
    def examples(self) -> int:
        counts = [self.metrics.get(f"feedback_{name}", 0) for name in ("pairs", "examples")]
        return sum(counts) if self.manifest.round else 0

    @property
    def seconds(self) -> float | None:
        """The time of all stages of the round; None where none is known."""
        return sum(self.times.values()) if self.times else None

    @property
    def start(self) -> str:
        """The round whose policy it started from, or "sft"; "" where that is not known."""
        return self.manifest.policy.removeprefix("round-").lstrip("0")

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens of the round's own samples for each second of its sample stage."""
        known = self.metrics
        seconds = sum(one for stage, one in self.times.items() if stage.startswith("sample"))
        return count_tokens(known) / seconds if seconds and "samples" in known else None


def count_tokens(metrics: Mapping[str, Any]) -> int:
    """Return the tokens of a round's own samples, from the metrics of its sample stage."""
    tokens: int = round(metrics.get("samples", 0) * metrics.get("response_tokens_mean", 0.0))
    return tokens


def read_rows(workdir: Path, last: int) -> list[Row]:
    """Read the rounds from 0 to `last` that have begun."""
    found = [manifests.load_manifest(round_folder(workdir, round)) for round in range(last + 1)]
    times, rows = read_times(workdir), list[Row]()
    before: int | None = 0
    for manifest in found:
        if manifest is None:
            continue
        total: int | None = manifest.metrics.get("steps_done")
        spans = {
            one["stage"]: one["end"] - one["start"]
            for one in times
            if one["round"] == manifest.round
        }
        steps = None if total is None or before is None else total - before
        rows.append(Row(manifest, steps, spans))
        before = total
    return rows


def read_rounds(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of each round in a run's workdir, with its number as "round".

    Names are those of metrics.jsonl; "reward_eval/low" and "/high" are the ends of the 95 %
    interval of "reward_eval", "seconds/train" is the time of a stage. A round without a value
    lacks the name: round 0, the SFT model, has no feedback and no steps.

    Raises:
      ConfigError: if there is no online run in the folder.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir, last_round(workdir))
    return [
        {"round": row.manifest.round}
        | dict(row.metrics)
        | {f"seconds/{stage}": seconds for stage, seconds in row.times.items()}
        for row in rows
    ]


def format_rounds(
    workdir: str | Path, *, last: int | None = None, most: int | None = None, width: int = WIDTH
) -> str:
    """Return a table of the rounds up to `last`, or of all: their budget, rewards and signs.

    A column is there if any of these rounds has a value for it, and there is room for it.
    `halos_jax/course/README.md` says what the columns are.

    Args:
      most: how many rounds it has at most, the newest; None: all.
      width: how many columns of text it has room for.

    Raises:
      ConfigError: if there is no online run in the folder.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir, last_round(workdir) if last is None else last)
    columns = _choose_columns(rows[-most:] if most else rows, _read_config(workdir))
    return format_table(columns, width=width)


def last_round(workdir: Path) -> int:
    """Return the number of the newest round in `workdir`.

    Raises:
      ConfigError: if there is none.
    """
    folder = workdir / "rounds"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    rounds = [int(name) for name in names if name.isdigit()]  # skip files like .DS_Store
    if not rounds:
        raise ConfigError(
            f"workdir: got {str(workdir)!r}, where there are no rounds; allowed: the workdir of an "
            "online run, such as runs/first (of a pipeline that of its task: runs/first/online)"
        )
    return max(rounds)


_Read = Callable[[Row], str]  # the text of a cell; "" if the round has no value


def _read_config(workdir: Path) -> dict[str, Any]:
    """Return the config of the run; an empty one where there is none."""
    path = workdir / changes.FILE
    return changes.read_plain(path) if path.exists() else {}


def _list_scorers(plain: Mapping[str, Any]) -> list[str]:
    """Return the names of `eval.scorers`, `reward.rules` and `reward.parts` of the run."""
    reward = plain.get("reward", {})
    rules = [rule.rpartition(":")[2] for rule in reward.get("rules", ())]
    return [*plain.get("eval", {}).get("scorers", ()), *rules, *reward.get("parts", ())]


def _name_examples(plain: Mapping[str, Any], known: Set[str]) -> str:
    """Return what the table calls the examples of a round, before the first has any too."""
    made = plain.get("feedback", {}).get("type", "pairwise")
    return "pairs" if made == "pairwise" and "feedback_examples" not in known else "examples"


def _choose_columns(rows: Sequence[Row], plain: Mapping[str, Any]) -> list[Column]:
    """Return the columns, of which some may have no value in any row."""
    known = {name for row in rows for name in row.metrics}

    def first(*names: str) -> str:
        return next((name for name in names if name in known), "")

    scorer = first(*[f"reward_eval/{name}" for name in _list_scorers(plain)])
    second = scorer.removeprefix("reward_eval/")
    # A round goes on from the one before it, unless the guard has gone back.
    went_back = any(
        row.manifest.round > 1 and row.start not in ("", str(row.manifest.round - 1))
        for row in rows
    )

    def make(name: str, read: _Read, rank: int = 0) -> Column:
        return Column(name, [read(row) for row in rows], rank)

    return [
        make("round", lambda row: str(row.manifest.round)),
        make("from", lambda row: row.start if went_back and row.manifest.round else "", 4),
        make("prompts", lambda row: str(row.prompts), 14),
        make("pass", _reader("prompt_pass", ".3g"), 15),
        make(_name_examples(plain, known), lambda row: str(row.examples), 5),
        make("steps", lambda row: "" if row.steps is None else str(row.steps), 12),
        make("reward", lambda row: show_estimate(row.metrics, "reward_eval")),
        make("win", _reader("win_rate_eval", ".2f")),
        make(second, lambda row: show_estimate(row.metrics, scorer), 3),
        make("test", lambda row: show_estimate(row.metrics, "reward_test"), 11),
        make("kl", _reader(first("kl_sft", "kl_sampled"), "z.2f"), 1),
        make("margin", _reader("fresh_margin", "+z.3f"), 2),
        make("ties", _reader("tied_share", ".2f"), 8),
        make("cut", _show_cut, 7),
        make("length", _reader(first("response_tokens_eval", "response_tokens_mean"), ".1f"), 6),
        make("stale", _reader(first("kl_stale", "kl_sampled_stale"), "z.2f"), 13),
        make("sec", lambda row: "" if row.seconds is None else _show_seconds(row.seconds), 9),
        make("tok/s", _show_rate, 10),
    ]


def _reader(name: str, form: str) -> _Read:
    """Return a reader of one metric."""
    return lambda row: format(row.metrics[name], form) if name in row.metrics else ""


def _show_cut(row: Row) -> str:
    """Return the share of the round's samples that the token limit has cut."""
    samples = row.metrics.get("samples", 0)
    return f"{row.metrics['truncated'] / samples:.2f}" if samples else ""


def _show_seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 1000 else f"{seconds:.0f}"


def _show_rate(row: Row) -> str:
    return "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
