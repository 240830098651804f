"""The tests mirror the package: halos_jax/a/b.py is tested by tests/a/test_b.py, and only there."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# Modules of declarations alone, and tests of the repository itself rather than of one module.
WITHOUT_TEST = {"config/rewards.py", "config/sections.py"}
WITHOUT_MODULE = {
    "test_documents.py",
    "test_guide.py",
    "test_layering.py",
    "test_mirror.py",
    "test_mutations.py",
}
WHOLE_PROGRAM = "e2e"


def find_mismatches(package: Path, tests: Path) -> list[str]:
    """Return one line for each module without its test and each test without its module."""
    modules = {
        file.relative_to(package)
        for file in package.rglob("*.py")
        if file.name != "__init__.py" and file.relative_to(package).as_posix() not in WITHOUT_TEST
    }
    expected = {path.with_name(f"test_{path.name}") for path in modules}
    present = {
        file.relative_to(tests)
        for file in tests.rglob("test_*.py")
        if file.relative_to(tests).parts[0] != WHOLE_PROGRAM
        and file.relative_to(tests).as_posix() not in WITHOUT_MODULE
    }
    return [f"no test: tests/{path}" for path in sorted(expected - present)] + [
        f"no module for tests/{path}" for path in sorted(present - expected)
    ]


def test_every_module_has_its_test():
    assert find_mismatches(REPOSITORY / "halos_jax", REPOSITORY / "tests") == []


def test_both_directions_are_found(tmp_path):
    for name in (
        "halos_jax/__init__.py",
        "halos_jax/config/rewards.py",
        "halos_jax/a/b.py",
        "halos_jax/a/c.py",
        "tests/conftest.py",
        "tests/a/test_b.py",
        "tests/a/test_gone.py",
        "tests/e2e/test_all.py",
        "tests/test_mirror.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_mismatches(tmp_path / "halos_jax", tmp_path / "tests")
    assert found == ["no test: tests/a/test_c.py", "no module for tests/a/test_gone.py"]
