"""How far the policy has come from those that sampled what a round replays, by their age."""

from pathlib import Path

from halos_jax.data.records import reading
from halos_jax.data.records.formats import sample_from_record
from halos_jax.rounds.context import Run
from halos_jax.rounds.replay.choose import ROUND, find_file, read_replayed
from halos_jax.rounds.watch import watched as watching
from halos_jax.signs.intervals import Estimate, estimate_mean
from halos_jax.types import Params, Sample
from halos_jax.workdir.manifests import round_folder


def choose_watched(run: Run, round: int) -> tuple[list[Sample], dict[str, int]]:
    """Return the watched samples of the prompts that a round replays, and the age of each prompt.

    They are at most as many as the watched samples of the round's own. The age is in rounds.
    """
    sources: dict[int, set[str]] = {}
    for row in read_replayed(round_folder(run.workdir, round)):
        sources.setdefault(row[ROUND], set()).add(row["prompt_id"])
    found, ages = list[Sample](), dict[str, int]()
    for before, prompts in sorted(sources.items() if run.config.rounds.watch_samples else ()):
        found += _read_samples(find_file(run.workdir, before, "samples.jsonl"), prompts)
        ages |= dict.fromkeys(prompts, round - before)
    return (watching.choose_watched(run.config, found, round) if found else []), ages


def _read_samples(path: Path, prompts: set[str]) -> list[Sample]:
    return [
        sample_from_record(record, file=str(path), line=line)
        for line, record in reading.read_records(path)
        if record["prompt_id"] in prompts
    ]


def measure_replayed(run: Run, params: Params, round: int) -> dict[str, Estimate]:
    """Return the mean log-ratio of replayed samples to the policy now, of each age.

    It is a KL divergence, and called so, where samples are drawn from the policy itself.
    """
    watched, ages = choose_watched(run, round)
    if not watched:
        return {}
    sums = watching.compute_sums(run, watched, params, label=f"replayed {round}")
    exact = watching.is_exact(run.config.sampling)
    name = "kl_stale_age" if exact else "kl_sampled_stale_age"
    found = {}
    for age in sorted({ages[one.prompt.prompt_id] for one in watched}):
        pairs = [
            (one.sum_logps - now, one.prompt.prompt_id)
            for one, now in zip(watched, sums, strict=True)
            if ages[one.prompt.prompt_id] == age and one.sum_logps is not None
        ]
        found[f"{name}/{age}"] = estimate_mean([one for one, _ in pairs], [id for _, id in pairs])
    return found
