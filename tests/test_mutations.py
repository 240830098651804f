"""The script that puts in faults: what is noticed, what is not, and what cannot be tried."""

import dataclasses

import pytest

from tests import mutations
from tests.mutations import Fault, TableError

SOURCE = (
    "LIMIT = 3\n\n\ndef is_small(x):\n    return x <= LIMIT\n\n\ndef add(x):\n    return x + 1\n"
)
TEST = "from package.part import is_small\n\n\ndef test_part():\n    assert is_small(3)\n"
BOUNDARY = Fault("package/part.py", "x <= LIMIT", "x < LIMIT", ("tests/test_part.py",))
UNSEEN = dataclasses.replace(BOUNDARY, old="x + 1", new="x + 2")


@pytest.fixture
def root(tmp_path):
    """Return a repository of one module and one test."""
    for name, text in {"package/part.py": SOURCE, "tests/test_part.py": TEST}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return tmp_path


def write_table(root, *faults):
    lines = []
    for one in faults:
        lines += ["[[fault]]", *(f"{n} = '{getattr(one, n)}'" for n in ("file", "old", "new"))]
        lines += [f"tests = {list(one.tests)}"]
    table = root / "faults.toml"
    table.write_text("\n".join(lines))
    return table


def test_a_fault_is_noticed_or_not_and_taken_out_again(root):
    noticed = mutations.try_fault(root, BOUNDARY, limit=60)
    assert noticed.noticed_by == "tests/test_part.py::test_part" and noticed.seconds > 0
    assert mutations.try_fault(root, UNSEEN, limit=60).noticed_by == ""
    assert (root / "package/part.py").read_text() == SOURCE


def test_a_fault_that_cannot_be_tried_is_an_error(root):
    table = write_table(root, BOUNDARY, UNSEEN)
    assert mutations.load_faults(table, root) == [BOUNDARY, UNSEEN]
    assert mutations.load_faults(table, root, ["LIMIT", "nothing"]) == [BOUNDARY]
    for changes, message in (
        ({"old": "x >= LIMIT"}, r"does not apply any more \(0 times in the source\)"),
        ({"old": "x"}, r"does not apply any more \(4 times in the source\)"),
        ({"file": "package/gone.py"}, "does not apply any more"),
        ({"new": BOUNDARY.old}, "does not apply any more"),
        ({"tests": ("tests/test_gone.py::test_x",)}, "has no test tests/test_gone.py::test_x"),
        ({"tests": ("tests/test_part.py::test_gone",)}, "no test tests/test_part.py::test_gone"),
    ):
        table = write_table(root, UNSEEN, dataclasses.replace(BOUNDARY, **changes))
        with pytest.raises(TableError, match=message):
            mutations.load_faults(table, root)


def test_tests_that_fail_or_break_by_themselves_would_notice_anything(root):
    breaking = dataclasses.replace(BOUNDARY, new="x <")
    with pytest.raises(TableError, match="the tests do not run"):
        mutations.try_fault(root, breaking, limit=60)
    (root / "tests/test_part.py").write_text(TEST.replace("(3)", "(4)"))
    with pytest.raises(TableError, match=r"test_part.py fails by itself \(exit code 1\)"):
        mutations.check_unchanged(root, [BOUNDARY], limit=60)


def test_the_table_fits_the_source():
    """A text that is no longer in the source goes along with what was changed."""
    assert len(mutations.load_faults(mutations.TABLE, mutations.ROOT)) > 150
