"""Every change to a file of a workdir between two starts is found, or does no harm.

The whole matrix, each file x each change x each stage in which a run was stopped, is a slow test;
a sample of it is tried always. HALOS_JAX_TAMPERING sets how much of the matrix (0 to 1) is tried.
"""

import os
import random
import shutil
import signal
import zlib
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.test_resume import WITH_TIMES

# Where a run is stopped: before the second event of that name.
STOPS = {
    "0 evaluate": "0 evaluate: before fsync rounds/0000/eval.shard",
    "1 sample": "1 sample: before fsync rounds/0001/samples.shard",
    "1 score": "1 score: before",
    "1 feedback": "1 feedback: before",
    "1 train": "1 train: after train_step",
    "2 sample": "2 sample: before fsync rounds/0002/samples.shard",
    "2 train": "2 train: after train_step",
    "finished": "",
}
# The stages with many files are tried in parts, each of them a test of some minutes.
PARTS = {"2 sample": 4, "2 train": 4, "finished": 3}
ALL = [(stop, part) for stop in STOPS for part in range(PARTS.get(stop, 1))]
# A model card that was edited is the user's, and stays.
OURS = (".lock", "ledger.jsonl", "metrics.jsonl", "config.json", "README.md", *WITH_TIMES)
PART = float(os.environ.get("HALOS_JAX_TAMPERING", "1"))


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def change_digit(data: bytes, rng: random.Random) -> bytes:
    digits = [at for at, sign in enumerate(data) if chr(sign).isdigit() and chr(sign).isascii()]
    if not digits:
        return data
    at = rng.choice(digits)
    return data[:at] + str((data[at] - 48 + 1) % 10).encode() + data[at + 1 :]


def on_lines(change):
    def edit(data: bytes, rng: random.Random) -> bytes:
        lines = data.splitlines(keepends=True)
        change(lines, rng)
        return b"".join(lines)

    return edit


def swap(lines, rng) -> None:
    if len(lines) > 1:
        one, two = rng.sample(range(len(lines)), 2)
        lines[one], lines[two] = lines[two], lines[one]


CHANGES = {
    "bit": flip_bit,
    "digit": change_digit,
    "dropped": on_lines(lambda lines, rng: lines.pop(rng.randrange(len(lines)))),
    "doubled": on_lines(lambda lines, rng: lines.insert(0, rng.choice(lines))),
    "swapped": on_lines(swap),
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "emptied": lambda data, rng: b"",
    "deleted": None,
}


def list_files(workdir: Path) -> list[Path]:
    found = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    return [path for path in found if path.name != ".lock" and path.stat().st_size]


def read_result(workdir: Path) -> dict[str, bytes]:
    """Return the files by which two runs are compared, but for those with times in them."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file()
        and path.name not in OURS
        and "checkpoints" not in path.parts
        and ".damaged-" not in str(path)
    }


def judge(program, workdir: Path, expected: dict[str, bytes]) -> str:
    """Start the run again; say what became of the change."""
    code, output, errors = program.run(workdir)
    if "Traceback" in output + errors:
        return "traceback"
    if code:
        return "refused" if errors.count("Error: ") else "silent"
    same = read_result(workdir) == expected
    said = "warning: " in output
    if same:
        return "said, and made good" if said else "harmless"
    return "said" if said else "silent"


def stop_run(program, folder: Path, stop: str, events: list[str]) -> Path:
    """Return the workdir of a run that was killed at a stop, or not at all."""
    workdir, signals = folder / stop.replace(" ", "-"), {}
    if STOPS[stop]:
        found = [event for event in events if event.startswith(STOPS[stop])]
        signals = {found[1]: signal.SIGKILL}
    code, _, errors = program.run(workdir, signals=signals)
    assert code == (-signal.SIGKILL if signals else 0), (stop, errors)
    return workdir


def tamper(program, stopped: Path, expected, chosen, tmp_path: Path) -> Counter:
    """Try the chosen (file, change, seed) on copies of a stopped run; return the verdicts."""
    verdicts: Counter = Counter()
    for name, change, seed in chosen:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(stopped, copy, symlinks=True)
        path = copy / name
        if CHANGES[change] is None:
            path.unlink()
        else:
            before = path.read_bytes()
            after = CHANGES[change](before, random.Random(seed))
            if after == before:
                continue
            path.write_bytes(after)
        verdict = judge(program, copy, expected)
        verdicts[verdict] += 1
        if verdict in ("silent", "traceback"):
            print(f"{stopped.name}: {name} {change} {seed}: {verdict}")
    return verdicts


def list_trials(stopped: Path) -> list[tuple[str, str, int]]:
    names = [str(path.relative_to(stopped)) for path in list_files(stopped)]
    return [(name, change, 7 * index) for index, name in enumerate(names) for change in CHANGES]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "part"), ALL)
def test_no_change_passes_in_silence(program, finished, tmp_path, stop, part):
    stopped = stop_run(program, tmp_path, stop, finished[1])
    trials, rng = list_trials(stopped), random.Random(stop)
    chosen = sorted(rng.sample(trials, max(round(PART * len(trials)), 1)))
    # By name: how many files a checkpoint has, and what they are called, differs between runs.
    parts = PARTS.get(stop, 1)
    chosen = [one for one in chosen if zlib.crc32(f"{one[0]} {one[1]}".encode()) % parts == part]
    verdicts = tamper(program, stopped, read_result(finished[0]), chosen, tmp_path)
    print(stop, part, f"{len(chosen)} of {len(trials)}", dict(verdicts))
    assert verdicts["silent"] == verdicts["traceback"] == 0
    assert verdicts["refused"] or PART < 1  # of a few changes it may be that none is


def test_a_few_changes_of_a_run_that_was_stopped(program, finished, tmp_path):
    stopped = stop_run(program, tmp_path, "1 train", finished[1])
    chosen = [
        ("rounds/0001/samples.jsonl", "digit", 0),
        ("rounds/0000/feedback.jsonl", "swapped", 4),
        ("rounds/0000/manifest.json", "deleted", 0),
        ("metrics.jsonl", "emptied", 0),
        ("config.json", "deleted", 0),
        ("inputs.json", "digit", 0),
        ("ledger.jsonl", "deleted", 0),
    ]
    verdicts = tamper(program, stopped, read_result(finished[0]), chosen, tmp_path)
    assert verdicts == {"refused": len(chosen)}
