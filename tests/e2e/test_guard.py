"""A run that its guard takes back or ends, and that is killed on the way, is the same run."""

import json
import random
import signal

import pytest

from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import round_folder
from tests.e2e.test_resume import is_of_checkpoint, read_metrics, run_to_the_end

# Four rounds of three prompts, of which none has a new policy for long: the KL of round 2 is beyond
# the bound, so the run goes back; when that happens once more, it ends.
BACK = (
    "rounds.total_prompts=15",
    "rounds.prompts_per_round=3",
    "optimizer.learning_rate=1.0",
    "guard.action=retry",
    "guard.fall=False",
    "guard.max_kl=0.001",
    "guard.max_retries=1",
)


def read_course(workdir) -> list[tuple]:
    """Return (policy that was sampled, action at the end, round to go back to, best round)."""
    found = []
    for folder in sorted((workdir / "rounds").iterdir()):
        one = manifests.load_manifest(folder)
        guard, best = one.decisions.get("guard", {}), one.decisions["best"]
        found.append((one.policy, guard.get("action"), guard.get("to"), best["round"]))
    return found


def read_all(workdir) -> dict:
    """Return what must be the same of two runs: files, metrics, and rounds that are kept."""
    skipped = (".lock", "config.json", "ledger.jsonl", "metrics.jsonl", "timings.jsonl")
    files = {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in skipped
    }
    files = {name: data for name, data in files.items() if not name.startswith("checkpoints/")}
    records = [path / "round" / "metadata" for path in sorted((workdir / "checkpoints").iterdir())]
    kept = [json.loads(path.read_text()) for path in records]
    sums = [(one["round_state"]["round"], one["sums"]) for one in kept]
    return {"files": files, "metrics": read_metrics(workdir), "checkpoints": sums}


@pytest.fixture(scope="module")
def went_back(program, tmp_path_factory):
    """Return the workdir of a run that nothing stopped but its guard, its events and output."""
    folder = tmp_path_factory.mktemp("went_back")
    code, output, errors = program.run(folder / "run", *BACK, trace=folder / "trace")
    assert (code, errors) == (0, "")
    return folder / "run", (folder / "trace").read_text().splitlines(), output


def test_show(went_back):
    print(went_back[2])
    print(read_course(went_back[0]))
    print([n for n, _ in read_all(went_back[0])["checkpoints"]])
    print("\n".join(e for e in went_back[1]))
    assert 0
