"""One check among others."""

import logging

import pytest

from halos_jax.audit.findings import passed
from halos_jax.audit.rederive.attempts import attempt, hush
from halos_jax.config import ConfigError
from halos_jax.storage import WorkdirError


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(WorkdirError("damaged"), "differs"), (ConfigError("not there"), "not checked")],
)
def test_an_error_ends_one_check_and_not_the_others(error, outcome):
    def check():
        yield passed("a", "b", 1)
        raise error

    (found,) = attempt("a", check)
    assert (found.check, found.outcome, found.why) == ("a", outcome, str(error))


def test_findings_are_returned_and_faults_of_the_program_are_not_hidden():
    found = passed("a", "b", 1)
    assert attempt("a", lambda: iter([found])) == [found]
    with pytest.raises(ZeroDivisionError):
        attempt("a", lambda: [1 / 0])


def test_stages_are_quiet_for_a_while(caplog):
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("halos_jax.rounds.stages")
    with hush():
        logger.warning("within")
    logger.warning("after")
    assert [record.message for record in caplog.records] == ["after"]
