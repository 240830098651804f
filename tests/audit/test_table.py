"""The table of checks."""

from halos_jax.audit.table import CHECKS
from halos_jax.config.tasks import TASKS, load


def test_every_row_names_a_function_and_tasks_that_exist():
    assert len({(check.name, check.run) for check in CHECKS}) == len(CHECKS) >= 4
    for check in CHECKS:
        assert callable(load(check.run)), check
        assert set(check.tasks) <= set(TASKS)
