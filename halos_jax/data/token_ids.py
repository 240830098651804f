"""Token ids that records bring along: each must be the id of a token of the tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.reading import OnBad, raise_error
from halos_jax.types import Demonstration, Judgement, Preference, Sample

# A record with outputs, and perhaps with their tokens.
Feedback: TypeAlias = Sample | Demonstration | Preference | Judgement
_Record = TypeVar("_Record", bound=Feedback)


def check_ids(
    records: Iterable[_Record], renderer: Renderer, on_bad: OnBad = raise_error
) -> list[_Record]:
    """Return the records whose ids are all those of tokens.

    For any other id, the embedding would return the row of some token, or an untrained row.

    Args:
      on_bad: called with the error of a record with a bad id; if it returns, the record is left
        out.

    Raises:
      RecordError: that error, with file and line, unless `on_bad` returns.
    """
    known, kept = renderer.token_ids, []
    for record in records:
        error = _find_wrong(record, known)
        if error is None:
            kept.append(record)
        else:
            on_bad(error)
    return kept


def _find_wrong(record: Feedback, known: frozenset[int]) -> RecordError | None:
    for name, ids in _list_ids(record):
        if known.issuperset(ids):
            continue
        wrong = next(number for number in ids if number not in known)
        place = record.prompt.place or f"prompt {record.prompt.prompt_id}"
        return RecordError(
            f"{place}: field {name!r}: got the id {wrong}, which no token of the tokenizer of "
            f"model.path has; allowed: ids of its {len(known)} tokens, {max(known)} at most; "
            "set model.path to the model that wrote the records, or leave prompt_ids, "
            "response_ids, ids_A and ids_B out of them to go by the text"
        )
    return None


def _list_ids(record: Feedback) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the ids of a record, with the name of the field that they stand in."""
    yield "prompt_ids", record.prompt_ids
    if isinstance(record, Sample):
        yield "response_ids", record.response_ids
        if record.drawn is not None:
            yield "drawn.kept_ids", np.unique(np.frombuffer(record.drawn.kept_ids, "<i4")).tolist()
    elif isinstance(record, Preference):
        for one in (record.chosen, record.rejected):
            yield "ids_A or ids_B", one.ids
    else:
        yield "response_ids", record.completion.ids
