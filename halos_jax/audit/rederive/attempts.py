"""One check among others: an error of it is a finding, and the others are made even so."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

from halos_jax.audit.findings import Finding, differs, not_checked
from halos_jax.config import ConfigError
from halos_jax.errors import UserError
from halos_jax.models.hf.families import ModelError


def attempt(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check, or one that says why it ended.

    An input that is not there leaves it open; another error means that files are not as they were.
    """
    try:
        return list(check())
    except (ConfigError, ModelError) as error:
        return [not_checked(name, "an input", str(error))]
    except UserError as error:
        return [differs(name, "a file", str(error))]


@contextlib.contextmanager
def hush() -> Iterator[None]:
    """Leave out what stages log for people who watch a run."""
    package = logging.getLogger("halos_jax")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)
