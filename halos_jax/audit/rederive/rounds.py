"""The rounds of an online run made again: samples, rewards, feedback, steps, evaluation, ending."""

import contextlib
import dataclasses
import functools
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from halos_jax import sharding
from halos_jax.audit.findings import Finding, compare, not_checked, passed
from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive import decisions, evaluations, feedback, rewards, same, samples, steps
from halos_jax.audit.rederive.attempts import attempt, hush
from halos_jax.audit.rederive.policies import Policies
from halos_jax.audit.rederive.replica import Replica, open_replica
from halos_jax.audit.rederive.samples import Draws
from halos_jax.config import VerifyConfig
from halos_jax.models.lora import merge_adapter
from halos_jax.rounds import stages
from halos_jax.rounds.context import NOTHING, Rollouts, Run
from halos_jax.rounds.evaluation import Split
from halos_jax.rounds.outcome.decisions import find_start
from halos_jax.rounds.proof.origin import identify
from halos_jax.rounds.refill import extents as ranges
from halos_jax.rounds.watch import after
from halos_jax.tasks.launch import use_copied_cache
from halos_jax.tasks.online import load_held_out
from halos_jax.training.followers import take_exported, take_policy
from halos_jax.training.loop import Dataset
from halos_jax.types import Params, TrainState
from halos_jax.workdir.manifests import Manifest

_NAME = "rederive"  # in `Opened.memory`


@dataclasses.dataclass
class Verifier:
    """What the checks of an online run share; made once a workdir."""

    opened: Opened
    replica: Replica
    policies: Policies
    held_out: list[Dataset | None] = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> VerifyConfig:
        """How much is made again."""
        return self.opened.given.verify

    def load_held_out(self, run: Run) -> Dataset | None:
        """Return what the run evaluated its loss on while it trained."""
        if not self.held_out:
            is_there = (self.replica.folder(0) / "feedback.jsonl").exists()
            load = functools.partial(self.replica.load_sft, run)
            self.held_out.append(load_held_out(run, load) if is_there else None)
        return self.held_out[0]

    def train(self, run: Run, state: TrainState, round: int) -> TrainState | None:
        """Train `round` again to its end, to have its policy (`policies.Train`)."""
        manifest = self.replica.manifests[round]
        return steps.train_again(self.replica, run, state, manifest, None, None).state


def check_round(opened: Opened, manifest: Manifest) -> Iterable[Finding]:
    """Make a round again, as far as `config.verify` says and the policies are there."""
    with find_verifier(opened) as verifier:
        return list(_check_round(verifier, manifest))


@contextlib.contextmanager
def find_verifier(opened: Opened) -> Iterator[Verifier]:
    """Yield the verifier of a workdir, with its mesh as the current one."""
    known = opened.memory.get(_NAME)
    if known is None:
        config = dataclasses.replace(opened.config, mesh=opened.given.mesh)
        scratch = tempfile.TemporaryDirectory(prefix="halos_jax-verify-")
        opened.closing.enter_context(scratch)
        mesh = sharding.make_mesh(config.mesh)
        use_copied_cache(opened.workdir, Path(scratch.name))
        with jax.set_mesh(mesh):
            opening = open_replica(config, opened.workdir, Path(scratch.name), mesh)
            replica = opened.closing.enter_context(opening)
        known = Verifier(opened, replica, Policies(replica, opened.given.verify.replay))
        known.policies.train = known.train
        opened.memory[_NAME] = known
    with jax.set_mesh(known.replica.mesh), hush():
        yield known


def _check_round(verifier: Verifier, manifest: Manifest) -> Iterator[Finding]:
    replica, round = verifier.replica, manifest.round
    run = replica.at(round)
    yield _compare_executions(run, manifest)
    yield from attempt("decisions", lambda: decisions.check_plan(replica, run, manifest))
    if round:
        yield from _check_drawn(verifier, run, manifest)
        yield from _check_files(verifier, run, manifest)
        yield from _check_training(verifier, run, manifest)
    yield from _check_evaluations(verifier, run, manifest)
    yield from attempt("decisions", lambda: decisions.check_ending(replica, manifest))


def _compare_executions(run: Run, manifest: Manifest) -> Finding:
    """Say whether the results of a round must come out the same to the last bit."""
    name, what = "execution", "results are compared to the last bit"
    others = {
        stage: same.explain_other(run.workspace, manifest, stage) for stage in manifest.stages
    }
    reasons = list(dict.fromkeys(filter(None, others.values())))
    count = sum(not reason for reason in others.values())
    if reasons:
        why = f"{'; '.join(reasons)}: they are compared within a tolerance"
        return not_checked(name, what, why, len(others), "stages")
    return passed(name, what, count, unit="stages")


# --------------------------------------------------------------------------- samples


def _check_drawn(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    """Check the samples of a round, by the policy with which it began."""
    if "samples.jsonl" not in manifest.files:
        return
    draws = _split_extents(verifier.replica, run, manifest)
    yield from attempt("samples", lambda: [samples.check_prompts(run.rollouts, draws)])

    def load() -> Params | None:
        state = verifier.policies.begin(run, manifest.round, keep=True)
        return None if state is None else take_policy(state.params)

    if verifier.replica.has_start(manifest.round):
        made = _explain_made(verifier.replica, run, manifest)
        mark = manifest.sampled_by.get("samples.jsonl")
        yield from attempt("samples", lambda: _check_origin(run, mark, load(), made))

    lacking = f"the checkpoint of {manifest.policy} is deleted"
    yield from attempt(
        "samples",
        lambda: _draw_again(verifier, run, manifest, draws, load, "sample", lacking=lacking),
    )


def _explain_made(replica: Replica, run: Run, manifest: Manifest) -> str:
    """Say why the policy that a round began with may have another fingerprint here; "": it may not.

    That of a checkpoint has the one that it had, but for the base of an adapter.
    """
    is_saved = (
        find_start(replica.scratch, manifest.round) > 0 or replica.find_checkpoint(0) is not None
    )
    if is_saved and run.trainer.frozen is None:
        return ""
    return same.explain_made(run.policy.settings, run.workspace, manifest, "sample")


def _check_origin(
    run: Run, recorded: str | None, params: Params | None, made: str = ""
) -> list[Finding]:
    """Compare the fingerprint of a policy with the one that the manifest says has sampled.

    `made` is why it may be another one on this device; "": it may not.
    """
    if not recorded or params is None:
        return []
    found = identify(params, run.trainer.frozen, run.policy.decoder).fingerprint
    wrong = [] if found == recorded else [f"{recorded} is recorded, but it is {found}"]
    what = "the fingerprint of the policy that drew them"
    if wrong and made:
        return [not_checked("samples", what, made, 1, "policies")]
    return [compare("samples", what, wrong, 1, unit="policies")]


def _split_extents(replica: Replica, run: Run, manifest: Manifest) -> list[Draws]:
    """Return a round's samples by its extents, each of which was split into shards by itself."""
    found = stages.read_samples(replica.folder(manifest.round) / "samples.jsonl")
    count = run.config.sampling.num_samples_per_prompt
    ends = [extent.stop for extent in ranges.read_extents(manifest)] or [manifest.stop]
    parts, start = [], manifest.start
    for end in ends:
        taken = found[(start - manifest.start) * count : (end - manifest.start) * count]
        parts.append(Draws("samples", manifest.round, run.prompts[start:end], taken))
        start = end
    surplus = found[(ends[-1] - manifest.start) * count :]
    last = dataclasses.replace(parts[-1], samples=[*parts[-1].samples, *surplus])
    return [*parts[:-1], last]


def _draw_again(
    verifier: Verifier,
    run: Run,
    manifest: Manifest,
    draws: list[Draws],
    load: Callable[[], Params | None],
    stage: str,
    *,
    lacking: str,
    rollouts: Rollouts | None = None,
) -> list[Finding]:
    """Draw a few shards again with the policy that `load` gives, if it is there."""
    name, wanted = draws[0].check, verifier.depth.samples
    total = sum(len(part.samples) for part in draws)
    if not (wanted and total):
        return []
    params = load()
    if params is None:
        why = f"{lacking}; --config.verify.replay=true trains it again"
        return [not_checked(name, "drawn again", why, total, "samples")]
    rollouts = rollouts or run.rollouts
    seed = zlib.crc32(f"{verifier.depth.seed} {manifest.round} {name}".encode())
    size = rollouts.config.sampling.shard_prompts
    found = samples.check_drawn(
        run,
        rollouts,
        merge_adapter(params, run.trainer.frozen),
        draws,
        samples.choose_shards(draws, size, wanted, seed),
        is_same=same.is_same(run.workspace, manifest, stage),
        folder=verifier.replica.make_folder(f"{name.replace(' ', '-')}-{manifest.round}"),
    )
    return [found]


# --------------------------------------------------------------------------- files and steps


def _check_files(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    """Check the scores and the feedback of a round, as far as it has them."""
    replica, stages_done = verifier.replica, manifest.stages
    if "score" in stages_done:
        is_same = same.is_same(run.workspace, manifest, "score")
        yield from attempt(
            "rewards",
            lambda: rewards.check_scores(replica, run.rollouts, manifest, is_same=is_same),
        )
        yield from attempt("decisions", lambda: feedback.check_refill(run, manifest, replica))
    if "feedback" in stages_done:
        yield from attempt("feedback", lambda: feedback.check_feedback(replica, run, manifest))


def _check_training(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    """Take steps of a round again, and compare their metrics and the next checkpoint."""
    depth = verifier.depth
    if "train" in manifest.stages and (depth.steps or depth.replay):
        yield from attempt("steps", lambda: _train_again(verifier, run, manifest))


def _train_again(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    replica, state = verifier.replica, verifier.policies.begin(run, manifest.round)
    if state is None:
        start = find_start(replica.scratch, manifest.round)
        why = f"the checkpoint at the end of round {start} is deleted; --config.verify.replay=true "
        yield not_checked("steps", "taken again", why + "trains it again", unit="steps")
        return
    first = int(state.step)
    most = None if verifier.depth.replay or verifier.depth.steps < 0 else verifier.depth.steps
    end = replica.find_break(manifest.round)
    if end is not None:
        most = min(end - first, end - first if most is None else most)
    is_same = same.is_same(run.workspace, manifest, "train")
    close = steps.find_close(run.policy.settings.compute_dtype)
    # The steps take the state over; a checkpoint within a tolerance is measured against it.
    begin = None if is_same or most is not None else jax.device_get(state.params)
    trained = steps.train_again(replica, run, state, manifest, verifier.load_held_out(run), most)
    yield steps.check_signs(manifest, trained.signs, close, is_same=is_same)
    folder = replica.find_folder(f"train-{manifest.round}")
    recorded = verifier.opened.workdir / "metrics.jsonl"
    yield steps.check_steps(recorded, folder, trained, close, first=first, is_same=is_same)
    if end is not None:
        why = f"the settings changed after step {end}; the steps up to there were taken again"
        yield not_checked("checkpoints", "the state at the end of the round", why)
    if trained.state is None:
        return
    kept = steps.find_kept(replica, run, manifest.round, begin)
    dtype = run.policy.settings.compute_dtype
    yield steps.check_state(trained.state, kept, dtype, is_same=is_same)
    verifier.policies.hold(run, manifest.round, trained.state)


# --------------------------------------------------------------------------- evaluations


def _check_evaluations(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    """Check answers to held-out prompts, their scores, and what is measured at a round's end."""
    replica, round = verifier.replica, manifest.round
    splits = evaluations.list_splits(manifest)
    for split in splits:
        yield from _check_scored(verifier, run, manifest, split)
    if not splits and not round:
        return

    def load() -> Params | None:
        if not round:
            return replica.load_start(run)
        state = verifier.policies.end(run, round)
        return None if state is None else take_exported(state)

    for split in splits:
        draws = [evaluations.read_drawn(replica, run, manifest, split)]
        again = functools.partial(
            _draw_again,
            verifier,
            run,
            manifest,
            draws,
            load,
            _name_stage(split, round),
            lacking=f"the checkpoint at the end of round {round} is deleted",
            rollouts=evaluations.make_rollouts(run, split),
        )
        yield from attempt(draws[0].check, again)
    if "evaluate" in manifest.stages and round:
        yield from attempt("staleness", lambda: _check_staleness(verifier, run, manifest))


def _check_staleness(verifier: Verifier, run: Run, manifest: Manifest) -> Iterator[Finding]:
    """Measure again how far the policy has come from the one that sampled the round."""
    state = verifier.policies.end(run, manifest.round)
    if state is None or not run.config.rounds.watch_samples:
        return
    is_same = same.is_same(run.workspace, manifest, "evaluate")
    close = steps.find_close(run.policy.settings.compute_dtype)
    done = after.add_staleness(run, state, NOTHING, manifest.round)
    yield rewards.check_metrics("staleness", manifest, done, close, is_same=is_same)


def _check_scored(
    verifier: Verifier, run: Run, manifest: Manifest, split: Split
) -> Iterator[Finding]:
    """Check an evaluation as far as no policy is needed."""
    replica = verifier.replica
    is_same = same.is_same(run.workspace, manifest, _name_stage(split, manifest.round))
    yield from attempt(
        split, lambda: evaluations.check_evaluation(replica, run, manifest, split, is_same=is_same)
    )
    draws, rollouts = (
        evaluations.read_drawn(replica, run, manifest, split),
        evaluations.make_rollouts(run, split),
    )
    yield from attempt(draws.check, lambda: [samples.check_prompts(rollouts, [draws])])


def _name_stage(split: Split, round: int) -> str:
    """Return the name under which the manifest says what an evaluation was executed on."""
    return "test" if split == "test" and round else "evaluate"
