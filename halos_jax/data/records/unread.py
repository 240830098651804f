"""What was not used of a source, reported once: fields that nothing reads, and bad records."""

import collections
import logging

from halos_jax.config.field_names import list_format
from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.sources import is_named
from halos_jax.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 3  # how many errors of bad records a report shows


class Skips:
    """Bad records: the first one is an error, or else (`data.skip_bad`) all are counted.

    Args:
      allowed: whether bad records are left out.
    """

    def __init__(self, *, allowed: bool):
        self._allowed = allowed
        self._errors: list[UserError] = []

    def add(self, error: UserError) -> None:
        """Leave out a bad record, or raise its error.

        Raises:
          UserError: `error`, unless bad records are left out.
        """
        if not self._allowed:
            raise error
        self._errors.append(error)

    def report(self, source: str, kept: int, verb: str = "read") -> None:
        """Log how many records of a source are left out, and how many are kept (`verb`)."""
        if self._errors:
            logger.warning(
                "%s: %d bad records are left out (data.skip_bad), %d are %s; the first: %s",
                source,
                len(self._errors),
                kept,
                verb,
                "; ".join(map(str, self._errors[:_SHOWN])),
            )

    def require(self, source: str, kept: int) -> None:
        """Raise RecordError if all records are left out."""
        if self._errors and not kept:
            raise RecordError(
                f"{source}: data.skip_bad leaves out all of its {len(self._errors)} records; the "
                f"first: {self._errors[0]}"
            )


class Tally:
    """Counts what is not used of a source while it is read, and reports it at the end.

    Args:
      source: where the records come from, for the report.
      edits: `skip`: leave out bad records; `ignored`: fields that are not reported.
    """

    def __init__(self, source: str, edits: Edits):
        self._source, self._edits = source, edits
        self._read: collections.Counter[str] = collections.Counter()
        self._fields: dict[str, collections.Counter[str]] = {}
        self._skips = Skips(allowed=edits.skip)

    def add(self, fields: Fields) -> None:
        """Count a record and those of its fields that nothing has read."""
        self._read[fields.file] += 1
        unread = {name for name in fields.unread() if not self._is_ignored(name)}
        if is_named(fields.file):  # its reader has picked the fields that count
            return
        unread -= list_format(fields.peek("type"))
        if unread:
            self._fields.setdefault(fields.file, collections.Counter()).update(unread)

    def _is_ignored(self, name: str) -> bool:
        """Return whether a field, or a field that it is part of, is ignored on purpose."""
        parts = name.split(".")
        return any(
            ".".join(parts[:count]) in self._edits.ignored for count in range(1, 1 + len(parts))
        )

    def skip(self, error: UserError) -> None:
        """Leave out a bad record, or raise its error, as `Skips.add` does."""
        self._skips.add(error)

    def report(self) -> None:
        """Log what was counted."""
        for file, counts in self._fields.items():
            shown = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            logger.warning(
                "%s: %d records; fields that are not read, and in how many: %s; set "
                "data.fields='prompt=FIELD' to read one, data.ignore_fields='FIELD' to ignore it",
                file,
                self._read[file],
                shown,
            )
        self._skips.report(self._source, sum(self._read.values()))
