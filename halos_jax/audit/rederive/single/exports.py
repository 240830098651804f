"""The exported model of an online run: made again from the checkpoint that it is of."""

from collections.abc import Iterator
from pathlib import Path

from halos_jax import storage
from halos_jax.audit.findings import Finding, compare, not_checked
from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive import same
from halos_jax.audit.rederive.attempts import attempt
from halos_jax.audit.rederive.rounds import Verifier, find_verifier
from halos_jax.course.best import read_best
from halos_jax.models.files.export import find_dtype
from halos_jax.policies import final
from halos_jax.rounds.outcome.decisions import keeps_best
from halos_jax.training.followers import take_exported
from halos_jax.workdir.intact import FINAL

_NAME, _WHAT = "final", "weights exported again from the policy that they are of"


def check_final(opened: Opened) -> list[Finding]:
    """Export the best or the last policy again; compare the files of weights."""
    if not (opened.workdir / FINAL).is_dir() or not opened.manifests:
        return []
    with find_verifier(opened) as verifier:
        return attempt(_NAME, lambda: _check(opened, verifier))


def _check(opened: Opened, verifier: Verifier) -> Iterator[Finding]:
    replica, last = verifier.replica, opened.manifests[-1]
    run, best = replica.at(last.round), read_best(last)
    round = last.round
    if keeps_best(run.config, is_evaluated=bool(run.held_out)) and best is not None:
        round = best.round if best.reward is not None else round
    state = verifier.policies.end(run, round) if round else None
    if round and state is None:
        yield not_checked(_NAME, _WHAT, f"the checkpoint at the end of round {round} is deleted")
        return
    params = replica.load_start(run) if state is None else take_exported(state)
    folder = replica.find_folder(_NAME)
    dtype = find_dtype(opened.workdir / FINAL)  # earlier versions had another default
    final.export_policy(params, run.policy, folder, frozen=run.trainer.frozen, dtype=dtype)
    wrong, names = compare_weights(opened.workdir / FINAL, folder)
    recomputed = round and replica.find_checkpoint(round) is None
    if wrong and recomputed and not same.is_same(run.workspace, replica.manifests[round], "train"):
        yield not_checked(_NAME, _WHAT, "the policy was trained again on something else")
        return
    yield compare(_NAME, f"{_WHAT}, round {round}", wrong, len(names), unit="files")


def compare_weights(recorded: Path, made: Path) -> tuple[list[str], list[str]]:
    """Return what is wrong with the files of weights in a folder, and their names."""
    names = sorted(
        {
            path.relative_to(folder).as_posix()
            for folder in (recorded, made)
            for path in folder.rglob("*.safetensors")
        }
    )
    wrong = []
    for name in names:
        files = [folder / name for folder in (recorded, made)]
        if not all(file.is_file() for file in files):
            wrong.append(f"{name} is in one of the two alone")
        elif storage.hash_file(files[0]) != storage.hash_file(files[1]):
            wrong.append(f"{name} has other weights")
    return wrong, names
