"""A run that is killed at any point and started again ends as one that was never stopped."""

import json
import os
import random
import signal
import time

import pytest

from halos_jax.metrics import is_time
from halos_jax.workdir import manifests
from halos_jax.workdir.changes import find_changes

# Files of a workdir with times in them: no two runs have the same.
WITH_TIMES = ("timings.jsonl", "journal.jsonl", "report.html")

# Points of a place (a stage, or what follows one) at which the long chain is killed.
POINTS_PER_PLACE = int(os.environ.get("HALOS_JAX_KILLS", "1"))
# (Between the training and the evaluation nothing is written: the latter begins at once. Nor is
# anything between an evaluation and the next round's sampling, behind which both rounds go on.)
PLACES = [
    f"{after}{round} {stage}"
    for round in range(3)
    for stage in manifests.stages_of(round)
    for after in ("", "after ")
    if (after, stage) != ("after ", "train") and (after, round, stage) != ("after ", 1, "evaluate")
]
PLACES += ["export", "after export"]
# Of a metrics record, what depends on the clock.


def choose_points(events: list[str], per_place: int, rng: random.Random) -> list[str]:
    """Choose events that happen once, `per_place` of each place, in their order."""
    once = [event for event in events if events.count(event) == 1]
    by_place: dict[str, list[str]] = {}
    for event in once:
        place = "checkpoint" if is_of_checkpoint(event) else event.partition(":")[0]
        by_place.setdefault(place, []).append(event)
    chosen = set()
    for place, of_place in by_place.items():
        count = per_place * (3 if place == "checkpoint" else 1)
        chosen |= set(rng.sample(of_place, min(count, len(of_place))))
    return [event for event in once if event in chosen]


def is_of_checkpoint(event: str) -> bool:
    """Tell whether an event belongs to a checkpoint's writing, checking or removal.

    It has no fixed place among the others: a thread writes, and what a killed process has not
    removed the next one does when it starts.
    """
    return event.startswith("background: ") or " checkpoints" in event or " verify " in event


def run_to_the_end(program, workdir, points: list[str], *overrides: str) -> list[str]:
    """Start the run, killed at each of `points`, again and again; return where it was killed.

    A process dies at whichever of the remaining points comes first.
    """
    died = []
    while True:
        trace = workdir.with_name("trace")
        trace.unlink(missing_ok=True)
        signals = dict.fromkeys(points, signal.SIGKILL)
        code, _, errors = program.run(workdir, *overrides, signals=signals, trace=trace)
        if code == 0:
            return died
        assert code == -signal.SIGKILL, errors
        died.append(trace.read_text().splitlines()[-1])
        passed = set() if is_of_checkpoint(died[-1]) else set(points[: points.index(died[-1])])
        points = [
            point
            for point in points
            if point != died[-1] and (point not in passed or is_of_checkpoint(point))
        ]


def read_metrics(workdir) -> dict:
    """Return the metrics by step and names; each record must be there once."""
    records = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = {name: value for name, value in json.loads(line).items() if not is_time(name)}
        key = (record["step"], record.get("round"), *sorted(record))
        assert key not in records, f"twice: {record}"
        records[key] = record
    return records


def assert_same_run(workdir, expected, *, per_round: int = 6) -> None:
    """Check that two workdirs hold the same run of 12 prompts, and the first no leftovers.

    Its rounds have `per_round` prompts, or any number if that is 0.
    """
    files = {path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()}
    files = {path for path in files if path.parts[0] != "checkpoints"}
    wanted = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert files == {path for path in wanted if path.parts[0] != "checkpoints"}
    assert not [path for path in files if "partial" in path.name or "shard" in path.name]
    others = (".lock", "config.json", "ledger.jsonl", "metrics.jsonl", *WITH_TIMES)
    for path in files - {manifests.Path(name) for name in others}:
        assert (workdir / path).read_bytes() == (expected / path).read_bytes(), path
    configs = [json.loads((folder / "config.json").read_text()) for folder in (workdir, expected)]
    assert [one for one in find_changes(*configs) if one.mark.role_in("online") != "aside"] == []
    assert read_metrics(workdir) == read_metrics(expected)
    # The newest one, and that of the best round if that is another one.
    kept = [list((folder / "checkpoints").iterdir()) for folder in (workdir, expected)]
    assert len(kept[0]) == len(kept[1]) <= 2 and all(path.name.isdigit() for path in kept[0])

    used = []
    for folder in sorted((workdir / "rounds").iterdir()):
        manifest = manifests.load_manifest(folder)
        assert manifest.next_stage is None
        manifests.verify_files(folder, manifest)
        if manifest.round:
            lines = (folder / "samples.jsonl").read_text().splitlines()
            ids = [json.loads(line)["prompt_id"] for line in lines]
            assert len(ids) == 3 * len(set(ids))
            assert len(set(ids)) == (per_round or manifest.stop - manifest.start)
            used += set(ids)
    assert len(used) == len(set(used)) == 12


def test_events_cover_every_stage(finished):
    workdir, events = finished
    assert_same_run(workdir, workdir)
    places = list(dict.fromkeys(event.partition(":")[0] for event in events))
    assert [place for place in places if place in PLACES] == PLACES
    assert len(places) >= 20


def test_kill_in_every_stage_and_between(program, finished, tmp_path):
    expected, events = finished
    points = choose_points(events, POINTS_PER_PLACE, random.Random(1))
    died = run_to_the_end(program, tmp_path / "run", points)
    assert_same_run(tmp_path / "run", expected)
    assert len(died) >= 20
    assert {event.partition(":")[0] for event in died} >= set(PLACES)


def test_kill_without_checkpoints_inside_a_stage(program, finished, tmp_path):
    expected, events = finished
    rng = random.Random(2)
    points = choose_points([event for event in events if " save " not in event], 1, rng)
    points = sorted(rng.sample(points, 8), key=points.index)
    died = run_to_the_end(program, tmp_path / "run", points, "checkpoint.every=0")
    assert_same_run(tmp_path / "run", expected)
    assert len(died) >= 6


@pytest.mark.parametrize(
    ("point", "where"),
    [
        ("1 train: after train_step 2", "round 1, stage train, step 2"),
        ("2 sample: after sample_shard 2", "round 2, stage sample"),
    ],
)
def test_sigterm_saves_and_asks_to_be_run_again(program, finished, tmp_path, point, where):
    workdir = tmp_path / "run"
    signals = {point: signal.SIGTERM}
    code, _, errors = program.run(workdir, "checkpoint.every=0", signals=signals)
    assert code == 75
    assert errors.splitlines() == [
        f"Interrupted: stopped by SIGTERM in {where}; saved; run the same command again to carry on"
    ]
    if "2 sample" in point:
        before = manifests.load_manifest(manifests.round_folder(workdir, 1))
        assert before.next_stage is None, "the round before is not done, though it was"
    code, output, _ = program.run(workdir, "checkpoint.every=0")
    assert code == 0
    if "train" in point:
        assert "carrying on in round 1 after step 2" in output
    assert_same_run(workdir, finished[0])


def test_kill_the_command_itself(program, finished, tmp_path):
    """Kill real processes at times that nothing in the program has chosen."""
    workdir, rng = tmp_path / "run", random.Random(3)
    for sign in ("rounds/0001/samples.jsonl", "checkpoints/00000004"):
        process = program.start(workdir)
        while process.poll() is None and not (workdir / sign).exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None
        process.kill()
        process.communicate()
    process = program.start(workdir)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "the last policy is in" in output
    assert_same_run(workdir, finished[0])
