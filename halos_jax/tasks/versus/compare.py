"""`task=compare`: two files of samples against each other, paired by prompt.

    workdir/pairs.jsonl        each pair: the prompt, both answers, their rewards and scores
    workdir/comparison.json    win rates, means and their differences, with intervals

`task=eval` writes the same two files where `eval.against` names a second policy.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halos_jax.config import Config
from halos_jax.data.records import formats as records
from halos_jax.data.records.edits import make_edits
from halos_jax.policies import source
from halos_jax.report.live import report_on
from halos_jax.rewards.function_scorer import make_rules
from halos_jax.rewards.held_out import check_held_out, find_relative, list_scorers, name_scorer
from halos_jax.rewards.labels import gives_rewards, list_rewards
from halos_jax.rewards.pairs import Scores
from halos_jax.rewards.scorers import make_scorer
from halos_jax.rounds import stages
from halos_jax.rounds.outcome import comparison
from halos_jax.rounds.outcome.comparison import Relative, Side
from halos_jax.tasks import label, scoring
from halos_jax.tasks.job import Job, open_job
from halos_jax.types import Sample
from halos_jax.workdir.interrupt import StopSignal


def run_comparison(config: Config, stop: StopSignal) -> dict[str, float]:
    """Compare the samples of `data.eval` with those of `eval.second_samples`; return the metrics.

    The k-th sample of a prompt meets the k-th one of the same prompt. `reward`, its rules and
    `eval.scorers` score both. A judge with `mode="compare"` is shown the two answers of each pair,
    in both orders. Samples without a partner are counted and left out.
    """
    for alone in _list_rewards(config).values():
        label.check_tokenizer(alone)
    with open_job(config, stop) as job:
        if not job.is_complete:
            with report_on(job.workspace):
                compare_job(job)
        return job.metrics


def compare_job(job: Job) -> None:
    """Do the stage of a job that is left."""
    config = job.config
    sets = read_sets(config)
    job.begin(
        inputs=records.digest(
            [[one.prompt.prompt_id, one.sample_id, one.output] for found in sets for one in found]
        )
    )
    config = source.use_final(config)
    paths = config.data.eval, config.eval.second_samples
    scores, relative = _score_sets(job, config, sets)
    sides = [
        Side({"name": path, "samples": len(found)}, found, own)
        for path, found, own in zip(paths, sets, scores, strict=True)
    ]
    job.commit("compare", comparison.write_comparison(job.workspace, sides[0], sides[1], relative))
    if job.workspace.is_writer:
        stages.remove_shards(job.workdir, "scores-*")


def read_sets(config: Config) -> tuple[list[Sample], list[Sample]]:
    """Read both sets of samples.

    Raises:
      RecordError: for a bad record, or if no sample of one has a partner in the other.
      RewardError: if a record lacks what the reward or a scorer needs.
    """
    data = config.data
    first = _read_set(config, data.eval, data.eval_split)
    second = _read_set(config, config.eval.second_samples, "")
    comparison.pair_named((data.eval, first), (config.eval.second_samples, second))
    return first, second


def check_data(config: Config, decoder: object, renderer: object) -> None:
    """Check the samples that the task compares."""
    read_sets(config)


def _read_set(config: Config, path: str, split: str) -> list[Sample]:
    samples = label.read_all_samples(path, split, make_edits(config.data))
    skip = config.data.skip_bad
    prompts = check_held_out(config, [one.prompt for one in samples], skip=skip)
    kept = {id(one) for one in prompts}
    own = _name_file(config, path)
    samples = [one for one in samples if id(one.prompt) in kept]
    return label.keep_rendered(own, samples, label.find_renderer(source.use_final(own)))


def _name_file(config: Config, path: str) -> Config:
    """Return the config that messages about a file of samples are made of."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=path))


# --------------------------------------------------------------------------- scoring


def _list_rewards(config: Config) -> dict[str, Config]:
    """Map the names of the reward ("") and of the scorers to configs whose reward it is."""
    own = {"": config} if gives_rewards(config.reward) else {}
    return own | list_scorers(config)


def _score_sets(
    job: Job, config: Config, sets: Sequence[Sequence[Sample]]
) -> tuple[list[dict[str, Scores]], dict[str, Relative]]:
    """Return the scores of each set, and the rewards that are to be asked of pairs."""
    relative: dict[str, Relative] = {}
    scores: list[dict[str, Scores]] = [{} for _ in sets]
    paths = config.data.eval, config.eval.second_samples
    for number, (name, alone) in enumerate(_list_rewards(config).items()):
        with name_scorer(name):
            renderer = label.find_renderer(alone)
            scorer = make_scorer(alone, job.mesh, renderer, job.workspace.stop.check)
            shown = [
                label.render_samples(found, renderer, _name_file(alone, path))
                if renderer is not None
                else found
                for path, found in zip(paths, sets, strict=True)
            ]
            if name in find_relative(config):
                relative[name] = Relative(scorer, alone, shown[0], shown[1])
                continue
            workspace = job.workspace.with_config(alone)
            for side, found in enumerate(shown):
                mark = f"scores-{number}-{side}"
                labels = scoring.score_samples(workspace, scorer, found, label=mark)
                scores[side][name] = labels.rewards
    for name, rule in make_rules(config.reward).items():
        for side, found in enumerate(sets):
            scores[side][name] = list_rewards(rule(found))
    return scores, relative


# --------------------------------------------------------------------------- limits


def check_compare(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each field that a comparison of two files does not use or lacks."""
    if values["eval.against"]:
        yield (
            f"eval.against: got {values['eval.against']!r}, allowed with task='compare': ''; two "
            "policies are compared by task='eval'"
        )
    for path in ("data.max_eval", "data.holdout"):
        if values[path]:
            yield (
                f"{path}: got {values[path]}, allowed with task='compare': 0; all samples of both "
                "files are compared"
            )
    named = [path for path in values if path.startswith("eval.scorers.")]
    scored = values["reward.kind"] != "none" or values["reward.rules"]
    if not (scored or named or any(path.startswith("reward.parts.") for path in values)):
        yield (
            "reward.kind: got 'none', but there is nothing else to compare samples by; allowed: "
            "'model', 'function' or 'judge', or a scorer in eval.scorers"
        )
