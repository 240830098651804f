"""Put faults into a copy of the package, one at a time, and see that a test notices each.

    python tests/mutations.py              # every fault of tests/faults.toml
    python tests/mutations.py sampler loop # those whose file, or text, has one of these words

A fault is one line that a slip of the pen could have written: another argument, a call left out, a
boundary moved by one. Each names the test files that must notice it, as a rule that of its module,
which are run up to the first failure. Exit codes: 0 all are noticed, 1 some are not, 2 the table is
wrong: a text that is not in the source (exactly once) any more, or tests that fail by themselves.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("faults.toml")
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
_FAILED, _TESTS_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE), 1


class TableError(Exception):
    """The table does not fit the source."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A text of one file, what a slip makes of it, and who must notice."""

    file: str  # from the root of the repository
    old: str
    new: str
    tests: tuple[str, ...]  # test files, or tests as pytest names them

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old!r} -> {new!r}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests said: who noticed (empty: nobody) after how many seconds."""

    noticed_by: str
    seconds: float


def load_faults(table: Path, root: Path, words: Sequence[str] = ()) -> list[Fault]:
    """Read the table's faults that have one of `words`, all if there is none.

    Raises:
      TableError: naming each of them that does not apply to the source.
    """
    with table.open("rb") as file:
        faults = [
            Fault(one["file"], one["old"], one["new"], tuple(one["tests"]))
            for one in tomllib.load(file)["fault"]
        ]
    faults = [one for one in faults if not words or any(word in str(one) for word in words)]
    wrong = []
    for fault in faults:
        path = root / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1 or fault.old == fault.new:
            wrong.append(f"does not apply any more ({count} times in the source): {fault}")
        missing = [name for name in fault.tests if not _has_test(root, name)]
        if missing or not fault.tests:
            wrong.append(f"has no test {', '.join(missing)}: {fault}")
    if wrong:
        raise TableError("\n".join(wrong))
    return faults


def _has_test(root: Path, name: str) -> bool:
    file, _, function = name.partition("::")
    path = root / file
    return path.is_file() and (
        not function or f"def {function}(" in path.read_text(encoding="utf-8")
    )


def run_tests(root: Path, tests: Sequence[str], limit: float) -> tuple[int, str, float]:
    """Run tests up to the first failure; return exit code, output and seconds.

    A test that hangs counts as one that fails.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, output = _TESTS_FAILED, f"FAILED {tests[0]} (no end after {limit:g} s)"
    return code, output, time.monotonic() - start


def check_unchanged(root: Path, faults: Sequence[Fault], limit: float) -> None:
    """Raise TableError where tests fail without any fault: they would notice anything."""
    for name in sorted({name for fault in faults for name in fault.tests}):
        code, output, seconds = run_tests(root, [name], limit)
        if code:
            raise TableError(f"{name} fails by itself (exit code {code}):\n{output[-2000:]}")
        print(f"passes without a fault  {seconds:5.1f} s  {name}", flush=True)


def try_fault(root: Path, fault: Fault, limit: float) -> Outcome:
    """Put the fault into the copy at `root`, run its tests, and take it out again.

    Raises:
      TableError: where the tests cannot even be collected.
    """
    path = root / fault.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, output, seconds = run_tests(root, fault.tests, limit)
    finally:
        path.write_text(source, encoding="utf-8")
    if code not in (0, _TESTS_FAILED):
        raise TableError(f"the tests do not run (exit code {code}) with {fault}\n{output[-2000:]}")
    found = _FAILED.search(output)
    return Outcome(found[1] if code and found else "a failure" if code else "", seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of the faults to try; none: all")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a fault's tests")
    parser.add_argument("--list", action="store_true", help="check that all faults apply, and stop")
    options = parser.parse_args()
    try:
        faults = load_faults(TABLE, ROOT, options.words)
        if options.list:
            print(*faults, f"{len(faults)} faults", sep="\n")
            return 0
        return try_all(faults, options.limit)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def try_all(faults: Sequence[Fault], limit: float) -> int:
    """Try faults one after the other in one copy; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="halos_jax_mutations_") as folder:
        # What the tests compile is nearly always the same: all of them share it.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, ignore=_LEFT_OUT)
        check_unchanged(root, faults, 5 * limit)
        missed, broken = 0, []
        for number, fault in enumerate(faults, 1):
            try:
                outcome = try_fault(root, fault, limit)
            except TableError as error:
                broken.append(str(error))
                continue
            missed += not outcome.noticed_by
            said = f"by {outcome.noticed_by}" if outcome.noticed_by else ""
            word = "noticed" if said else "NOT NOTICED"
            print(f"{number:3d} {word} {outcome.seconds:5.1f} s  {fault}  {said}", flush=True)
    print(f"{len(faults) - missed - len(broken)} of {len(faults)} faults noticed")
    if broken:
        raise TableError("\n".join(broken))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
