"""Two sets of samples against each other: paired by prompt, compared by all scores, written down.

workdir/pairs.jsonl        each pair: the prompt, both answers, their rewards and scores
workdir/comparison.json    win rates, means and their differences, with intervals
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax import sharding, storage
from halos_jax.config import Config
from halos_jax.console.table import Column, format_table
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.turns import turns_to_record
from halos_jax.rewards.held_out import name_scorer
from halos_jax.rewards.labels import Scorer
from halos_jax.rewards.pairs import Scores, score_pairs
from halos_jax.rounds import stages
from halos_jax.rounds.context import StageResult
from halos_jax.signs.intervals import Estimate, name_estimate
from halos_jax.signs.pairs import Comparison, Pairing, compare_scores, pair_samples
from halos_jax.types import Sample
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)

PAIRS, COMPARISON = "pairs.jsonl", "comparison.json"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two sets of samples.

    Attributes:
      about: what it is, for comparison.json; "name" is what messages call it.
      samples: its samples.
      scores: name of a scorer ("" for the reward) -> the score of each sample.
    """

    about: Mapping[str, Any]
    samples: Sequence[Sample]
    scores: Mapping[str, Scores]


@dataclasses.dataclass(frozen=True)
class Relative:
    """A reward that compares samples: it is asked of each pair by itself.

    Attributes:
      scorer, config: the scorer, and the config whose reward it is.
      first, second: the samples of either side, with the tokens that the reward needs.
    """

    scorer: Scorer
    config: Config
    first: Sequence[Sample]
    second: Sequence[Sample]


def write_comparison(
    workspace: Workspace, first: Side, second: Side, relative: Mapping[str, Relative]
) -> StageResult:
    """Pair the samples, compare all scores, write pairs.jsonl and comparison.json; log a table.

    Returns:
      The files, and metrics: `win_rate_eval` (a tie counts one half), `reward_eval` and
      `reward_against` (means over the pairs), `reward_gain` (their difference), each with /NAME
      for a scorer and with an interval.

    Raises:
      RecordError: if no sample has a partner.
    """
    pairing = pair_named(
        (first.about["name"], first.samples), (second.about["name"], second.samples), say=True
    )
    scores = _collect_scores(first, second, relative, pairing.pairs)
    paired = [(first.samples[i], second.samples[j]) for i, j in pairing.pairs]
    prompts = [one.prompt.prompt_id for one, _ in paired]
    found = {name: compare_scores(*both, prompts) for name, both in scores.items()}
    rows = [_make_row(pair, scores, index) for index, pair in enumerate(paired)]
    stages.write_rows(workspace, workspace.workdir / PAIRS, rows)
    unpaired = _count_unpaired(pairing)
    record = {
        "first": first.about,
        "second": second.about,
        "prompts": len(set(prompts)),
        "pairs": len(paired),
        "unpaired": unpaired,
        **({"reward": found[""].to_record()} if "" in found else {}),
        "scorers": {name: one.to_record() for name, one in found.items() if name},
        "length": _compare_lengths(paired, prompts),
    }
    if workspace.is_writer:
        storage.write_json_atomic(workspace.workdir / COMPARISON, record)
    sharding.wait_for_all("wrote the comparison")
    logger.info("%s", format_comparison(record))
    metrics = {"pairs_eval": len(paired), **_list_metrics(found)}
    metrics |= {f"unpaired_{name}": count for name, count in unpaired.items() if count}
    return StageResult({PAIRS: len(paired), COMPARISON: 1}, metrics)


def _collect_scores(
    first: Side, second: Side, relative: Mapping[str, Relative], pairs: Sequence[tuple[int, int]]
) -> dict[str, tuple[Scores, Scores]]:
    """Return the scores of both samples of each pair, by the name of the scorer."""
    scores = {
        name: ([values[i] for i, _ in pairs], [second.scores[name][j] for _, j in pairs])
        for name, values in first.scores.items()
    }
    for name, one in relative.items():
        with name_scorer(name):
            shown = [(one.first[i], one.second[j]) for i, j in pairs]
            ours, theirs, counts = score_pairs(one.scorer, shown, one.config.reward)
        scores[name] = ours, theirs
        listed = ", ".join(f"{count} {what}" for what, count in counts.items())
        logger.info("%s: %s", name or "reward", listed)
    return scores


def pair_named(
    first: tuple[str, Sequence[Sample]], second: tuple[str, Sequence[Sample]], *, say: bool = False
) -> Pairing:
    """Pair named sets of samples; with `say`, log what has no partner."""
    pairing = pair_samples(first[1], second[1])
    if not pairing.pairs:
        raise RecordError(
            f"{second[0]}: none of its {len(second[1])} samples is of a prompt of {first[0]} "
            f"({len(first[1])} samples), so there is nothing to compare; allowed: samples for the "
            "same prompts, with the same prompt_id; sample both from one file of prompts"
        )
    if say and not pairing.is_whole:
        logger.warning(
            "%d pairs: %d of %d samples of %s and %d of %d of %s have no partner and are left out "
            "(prompts of one set alone: %d and %d)",
            len(pairing.pairs),
            pairing.first_alone,
            len(first[1]),
            first[0],
            pairing.second_alone,
            len(second[1]),
            second[0],
            pairing.first_prompts,
            pairing.second_prompts,
        )
    return pairing


def _count_unpaired(pairing: Pairing) -> dict[str, int]:
    return {
        "first": pairing.first_alone,
        "second": pairing.second_alone,
        "first_prompts": pairing.first_prompts,
        "second_prompts": pairing.second_prompts,
    }


def _make_row(
    pair: tuple[Sample, Sample], scores: Mapping[str, tuple[Scores, Scores]], index: int
) -> dict[str, Any]:
    """Return the record of a pair; each list has the first sample's value, then the second's."""
    found = {name: [one[index], other[index]] for name, (one, other) in scores.items()}
    row: dict[str, Any] = {
        "prompt_id": pair[0].prompt.prompt_id,
        "prompt": turns_to_record(pair[0].prompt.turns),
        "sample_ids": [one.sample_id for one in pair],
        "outputs": [one.output for one in pair],
    }
    if "" in found:
        row["rewards"] = found[""]
    return row | {"scores": {name: both for name, both in found.items() if name}}


def _compare_lengths(
    paired: Sequence[tuple[Sample, Sample]], prompts: Sequence[str]
) -> dict[str, Any]:
    """Compare the lengths of the answers: in tokens, if all of them have tokens of their own."""
    by_tokens = all(one.response_ids for pair in paired for one in pair)
    sizes = [
        [float(len(one.response_ids if by_tokens else one.output)) for one in pair]
        for pair in paired
    ]
    ones, others = ([size[side] for size in sizes] for side in (0, 1))
    found = compare_scores(ones, others, prompts).to_record()
    means = {name: found[name] for name in ("first", "second", "gain")}
    return {"unit": "tokens" if by_tokens else "characters", **means}


def _list_metrics(found: Mapping[str, Comparison]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, one in found.items():
        end = f"/{name}" if name else ""
        named: dict[str, Estimate | None] = {
            f"win_rate_eval{end}": one.win_rate,
            f"reward_eval{end}": one.first,
            f"reward_against{end}": one.second,
            f"reward_gain{end}": one.gain,
        }
        for path, estimate in named.items():
            metrics |= name_estimate(path, estimate) if estimate is not None else {}
        if one.unscored:
            metrics[f"unscored_eval{end}"] = one.unscored
    return metrics


def format_comparison(record: Mapping[str, Any]) -> str:
    """Return the lines of a table of what comparison.json holds."""
    rows = {"reward": record["reward"]} if "reward" in record else {}
    rows |= record["scorers"]
    found = list(rows.values())
    columns = [
        Column("scored by", list(rows)),
        Column("win rate", [_show(one["win_rate"]) for one in found]),
        Column("difference", [_show(one["gain"], "+.3f") for one in found]),
        Column("first", [_show(one["first"], ".3f", ends=False) for one in found], 1),
        Column("second", [_show(one["second"], ".3f", ends=False) for one in found], 1),
        *(
            Column(name, [str(one[name]) for one in found], 2)
            for name in ("wins", "ties", "losses")
        ),
        Column("unscored", [str(one["unscored"] or "") for one in found], 1),
    ]
    length = record["length"]
    sizes = [_show(length[name], ".1f", ends=False) for name in ("first", "second")]
    return "\n".join(
        [
            f"first: {record['first']['name']}; second: {record['second']['name']}",
            f"{record['pairs']} pairs of {record['prompts']} prompts; length {sizes[0]} and "
            f"{sizes[1]} {length['unit']}, difference {_show(length['gain'], '+.1f')}",
            *([format_table(columns)] if found else []),
        ]
    )


def _show(estimate: Mapping[str, float | None] | None, form: str = ".3f", ends: bool = True) -> str:
    """Return an estimate with its interval in brackets, if that is known and wanted."""
    if estimate is None:
        return ""
    shown = format(estimate["value"], form)
    low, high = estimate["low"], estimate["high"]
    if not ends or low is None or high is None:
        return shown
    return f"{shown} ({format(low, form)} to {format(high, form)})"
