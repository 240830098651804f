"""A run that its guard takes back or ends, and that is killed on the way, is the same run."""

import json
import random

import pytest

from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import round_folder
from tests.e2e.test_resume import WITH_TIMES, read_metrics, run_to_the_end

# Rounds of three prompts. At a learning rate of 1 the samples of round 2 are beyond the bound, and
# round 1 is still the best. At 0.3 they are not (7 nats), but those of round 3 are (18 nats): its
# policy and that of round 2 are beyond, and that of round 1 is the best of those within the bound.
SMALL = ("rounds.prompts_per_round=3", "guard.fall=False")
BACK = (
    *SMALL,
    "rounds.total_prompts=12",
    "optimizer.learning_rate=0.3",
    "guard.max_kl=10",
    "guard.action=retry",
)
STOPPED = (
    *SMALL,
    "rounds.total_prompts=15",
    "optimizer.learning_rate=1.0",
    "guard.max_kl=0.001",
    "guard.action=stop",
    "rounds.export_each=True",
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
    skipped = (".lock", "config.json", "ledger.jsonl", "metrics.jsonl", *WITH_TIMES)
    files = {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in skipped
    }
    files = {name: data for name, data in files.items() if not name.startswith("checkpoints/")}
    states = [(one["round"], one["step"], one["sums"]) for one in read_states(workdir)]
    return {"files": files, "metrics": read_metrics(workdir), "checkpoints": states}


def read_states(workdir) -> list[dict]:
    """Return the position of each checkpoint, in order, with the checksums of its arrays."""
    folders = sorted((workdir / "checkpoints").iterdir())
    records = [json.loads((one / "round" / "metadata").read_text()) for one in folders]
    return [one["round_state"] | {"sums": one["sums"]} for one in records]


@pytest.fixture(scope="module")
def went_back(program, tmp_path_factory):
    """Return the workdir of a run that its guard has taken back once, and its events."""
    folder = tmp_path_factory.mktemp("went_back")
    code, output, errors = program.run(folder / "run", *BACK, trace=folder / "trace")
    assert (code, errors) == (0, "")
    assert "starts from the policy of round 1, with a learning rate of 0.15" in output
    return folder / "run", (folder / "trace").read_text().splitlines()


def test_a_run_goes_back_to_its_best_round_and_its_steps_go_on(went_back):
    workdir, _ = went_back
    assert read_course(workdir) == [
        ("sft", None, None, 0),
        ("sft", "none", None, 1),
        ("round-0001", "none", None, 1),
        ("round-0002", "retry", 1, 1),
        ("round-0001", "none", None, 4),
    ]
    rates = {
        key[0]: one["counters/lr"]
        for key, one in read_metrics(workdir).items()
        if "loss/train" in one
    }
    assert list(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx([0.3, 0.15, 0.15])
    ranges = [manifests.load_manifest(round_folder(workdir, round)) for round in (1, 2, 3, 4)]
    assert [(one.start, one.stop) for one in ranges] == [(0, 3), (3, 6), (6, 9), (9, 12)]


def test_killed_around_its_way_back_it_ends_as_if_nothing_had_happened(
    program, went_back, tmp_path
):
    expected, events = went_back
    points = [
        "after 3 evaluate: before fsync checkpoints/00000006",  # decided, and not committed
        "after 3 evaluate: before unlink rounds/0003/eval.shard-0001.jsonl",  # committed
        "after 3 evaluate: after verify 2",  # round 1's policy is back
        "4 sample: after sample_shard 4",
        "4 train: after train_step 7",
        "4 train: after train_step 8",
    ]
    assert set(points) <= set(events)
    died = run_to_the_end(program, tmp_path / "run", points, *BACK)
    assert len(died) >= 5
    assert read_all(tmp_path / "run") == read_all(expected)


def test_a_stopped_run_exports_its_best_round_and_goes_on_when_it_may(program, tmp_path):
    """Killed before and after the export, it exports the policy of round 1, not the last."""
    workdir, trace = tmp_path / "run", tmp_path / "trace"
    code, output, errors = program.run(workdir, *STOPPED, trace=trace)
    assert (code, errors) == (0, "") and "the policy of round 1, the best, is in" in output
    exported = [
        (workdir / folder / "model.safetensors").read_bytes()
        for folder in ("final", "rounds/0001/model", "rounds/0002/model")
    ]
    assert exported[0] == exported[1] != exported[2]
    assert [state["round"] for state in read_states(workdir)] == [1, 2]
    events = trace.read_text().splitlines()
    last = [event for event in events if event.startswith("after 2 evaluate: ")][-1]
    died = run_to_the_end(program, tmp_path / "killed", [last, events[-1]], *STOPPED)
    assert died[-1] == events[-1]
    assert read_all(tmp_path / "killed") == read_all(workdir)
    # It is complete and says why, until it may go on: round 3 follows the last policy.
    assert "nothing to do" in program.run(workdir, *STOPPED)[1]
    code, output, _ = program.run(workdir, *STOPPED, "guard.action=warn")
    assert code == 0 and "guard.action: 'stop' -> 'warn'; from here on" in output
    assert [one[:2] for one in read_course(workdir)][2:4] == [
        ("round-0001", "stop"),
        ("round-0002", "warn"),
    ]
    assert len(read_course(workdir)) == 6
    assert "nothing to do" in program.run(workdir, *STOPPED, "guard.action=warn")[1]


@pytest.mark.slow
def test_killed_at_twenty_instants_it_is_the_same_run(program, went_back, tmp_path):
    expected, events = went_back
    rng = random.Random(13)
    once = [event for event in events if events.count(event) == 1]
    points = sorted(rng.sample(once, 20), key=events.index)
    died = run_to_the_end(program, tmp_path / "run", points, *BACK)
    assert len(died) >= 12  # one that is passed by the time of a restart is not met again
    assert read_all(tmp_path / "run") == read_all(expected)
