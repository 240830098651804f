"""What a run decided by itself, decided again from what its manifests hold."""

import dataclasses

from halos_jax.audit.findings import Finding, compare
from halos_jax.audit.rederive.compare import compare_values
from halos_jax.audit.rederive.replica import Replica
from halos_jax.course.round_size import DECISION as SIZE
from halos_jax.data import datasets
from halos_jax.rounds.budget import RoundPlan
from halos_jax.rounds.context import Run, StageResult
from halos_jax.rounds.outcome.decisions import NAMES, decide, find_start, name_policy
from halos_jax.rounds.outlook import choose_prompts_per_round
from halos_jax.rounds.pending import name_reference
from halos_jax.rounds.refill import extents as ranges
from halos_jax.workdir.manifests import Manifest


def check_plan(replica: Replica, run: Run, manifest: Manifest) -> list[Finding]:
    """Plan a round again: its range, its number of prompts, the policies that it names."""
    return [_check_range(replica, run, manifest), _check_names(replica, run, manifest)]


def _check_range(replica: Replica, run: Run, manifest: Manifest) -> Finding:
    what, round = "the round's range of the prompts", manifest.round
    if not round:
        held = datasets.identify_prompts([*run.held_out, *run.test])
        wrong = [] if held == manifest.prompts else ["the held-out prompts are others"]
        return compare("decisions", "the held-out prompts", wrong, 1, unit="decisions")
    opened = tuple(
        (replica.manifests[one].start, replica.manifests[one].stop)
        for one in replica.rounds
        if 0 < one < round
    )
    budget = dataclasses.replace(run.budget, opened=opened)
    done = [replica.manifests[one] for one in replica.rounds if one < round]
    size, chosen = choose_prompts_per_round(run.config, budget, done, len(run.prompts))
    plan, wrong = budget.plan_next(round, size, len(run.prompts)), list[str]()
    extents = ranges.read_extents(manifest)
    first = extents[0].stop if extents else manifest.stop
    if RoundPlan(manifest.start, first) != plan:
        wrong.append(
            f"prompts {manifest.start} to {first} are recorded, {plan.start} to {plan.stop} follow"
        )
    recorded = {name: one for name, one in manifest.decisions.items() if name == SIZE}
    difference = compare_values(recorded, chosen)
    wrong += [difference.first] if difference.first else []
    prompts = run.prompts[manifest.start : manifest.stop]
    if datasets.identify_prompts(prompts) != manifest.prompts:
        wrong.append("the prompts of that range are others than those of the run")
    return compare("decisions", what, wrong, 1, unit="decisions")


def _check_names(replica: Replica, run: Run, manifest: Manifest) -> Finding:
    start, wrong = find_start(replica.scratch, manifest.round), list[str]()
    policy = name_policy(run.config, start)
    reference = name_reference(run.config, policy, replica.workdir)
    found = {"policy": (manifest.policy, policy), "reference": (manifest.reference, reference)}
    for name, (recorded, follows) in found.items():
        if recorded != follows:
            wrong.append(f"{name}: {recorded!r} is recorded, {follows!r} follows")
    if manifest.seed != run.config.seed:
        wrong.append(f"seed: {manifest.seed} is recorded, {run.config.seed} follows")
    return compare("decisions", "the policy and the reference of the round", wrong, 1, unit="names")


def check_ending(replica: Replica, manifest: Manifest) -> list[Finding]:
    """Decide again at the end of a round: the best round, and the guard's verdict.

    A run that was stopped before its last round's end may have gone on with other bounds: then the
    decision must follow from these.
    """
    recorded = {name: one for name, one in manifest.decisions.items() if name in NAMES}
    if manifest.next_stage is not None:
        return []
    others = {name: one for name, one in manifest.decisions.items() if name not in NAMES}
    undecided = dataclasses.replace(manifest, decisions=others)
    first = ""
    for place in (manifest.round + 1, manifest.round):
        run = replica.at(place)
        evaluated = StageResult({}, manifest.metrics)
        done = decide(run, undecided, evaluated, is_kept=lambda round: True)
        found = {name: one for name, one in done.decisions.items() if name in recorded}
        first = compare_values(recorded, _to_plain(found)).first
        if not first:
            break
    what = "the best round and the guard's verdict, from the recorded metrics"
    wrong = [first] if first else []
    return [compare("decisions", what, wrong, len(recorded), unit="decisions")]


def _to_plain(value: object) -> object:
    """Return a value as JSON gives it back: tuples as lists."""
    if isinstance(value, dict):
        return {key: _to_plain(one) for key, one in value.items()}
    return [_to_plain(one) for one in value] if isinstance(value, list | tuple) else value
