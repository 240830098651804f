"""What of a source was not used, said once: fields that nobody read, and records that were bad."""

import collections
import logging

from halos_jax.config.field_names import list_format
from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.sources import is_named
from halos_jax.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 3  # errors of records that are left out


class Skips:
    """Bad records: the first one's error is raised or, where they are left out, all are counted.

    Args:
      allowed: whether they are left out (`data.skip_bad`).
    """

    def __init__(self, *, allowed: bool):
        self._allowed = allowed
        self._errors: list[UserError] = []

    def add(self, error: UserError) -> None:
        """Leave out a bad record, or raise its error.

        Raises:
          UserError: the one given, unless the config says that bad records are left out.
        """
        if not self._allowed:
            raise error
        self._errors.append(error)

    def report(self, source: str, kept: int, verb: str = "read") -> None:
        """Log how many of a source are left out, and how many are kept ("read")."""
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
        """Raise RecordError where every one of the records is left out."""
        if self._errors and not kept:
            raise RecordError(
                f"{source}: data.skip_bad leaves out all of its {len(self._errors)} records; the "
                f"first: {self._errors[0]}"
            )


class Tally:
    """Counts what is not used of a source while it is read, and says it at the end.

    Args:
      source: of the records.
      edits: `skip` says that bad records are left out, `ignored` which fields are not spoken of.
    """

    def __init__(self, source: str, edits: Edits):
        self._source, self._edits = source, edits
        self._read: collections.Counter[str] = collections.Counter()
        self._fields: dict[str, collections.Counter[str]] = {}
        self._skips = Skips(allowed=edits.skip)

    def add(self, fields: Fields) -> None:
        """Count a record, and what it says that was not read."""
        self._read[fields.file] += 1
        unread = {name for name in fields.unread() if not self._is_ignored(name)}
        if is_named(fields.file):  # its reader has made the record of what counts
            return
        unread -= list_format(fields.peek("type"))
        if unread:
            self._fields.setdefault(fields.file, collections.Counter()).update(unread)

    def _is_ignored(self, name: str) -> bool:
        """Say whether nothing is to be said of a field, or of all that it stands in."""
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
                "%s: %d records; fields that are not read, and in how many: %s; data.fields="
                "'prompt=FIELD' says which field is meant, data.ignore_fields='FIELD' that none is",
                file,
                self._read[file],
                shown,
            )
        self._skips.report(self._source, sum(self._read.values()))
