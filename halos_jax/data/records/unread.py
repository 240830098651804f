"""What of a source was not used, said once: fields that nobody read, and records that were bad."""

import collections
import logging

from halos_jax.config.field_names import list_format
from halos_jax.data.records.fields import Edits, Fields, RecordError
from halos_jax.data.records.sources import is_named

logger = logging.getLogger(__name__)

_SHOWN = 3  # errors of records that are left out


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
        self._errors: list[RecordError] = []

    def add(self, fields: Fields) -> None:
        """Count a record, and what it says that was not read."""
        self._read[fields.file] += 1
        unread = fields.unread() - self._edits.ignored
        if is_named(fields.file):  # its reader has made the record of what counts
            return
        unread -= list_format(fields.peek("type"))
        if unread:
            self._fields.setdefault(fields.file, collections.Counter()).update(unread)

    def skip(self, error: RecordError) -> None:
        """Leave out a bad record, or raise its error.

        Raises:
          RecordError: unless the config says that bad records are left out.
        """
        if not self._edits.skip:
            raise error
        self._errors.append(error)

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
        if self._errors:
            logger.warning(
                "%s: %d bad records are left out (data.skip_bad), %d are read; the first: %s",
                self._source,
                len(self._errors),
                sum(self._read.values()),
                "; ".join(map(str, self._errors[:_SHOWN])),
            )
