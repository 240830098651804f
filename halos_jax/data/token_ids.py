"""Token ids that records bring along: each must be the id of a token of the tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.records.fields import RecordError
from halos_jax.types import Preference, Sample


def check_ids(records: Iterable[Any], renderer: Renderer) -> None:
    """Raise RecordError, with file and line, where an id in a record is that of no token.

    An embedding would give such an id the row of another token, or one that nothing has trained.
    """
    known = renderer.token_ids
    for record in records:
        for name, ids in _list_ids(record):
            if known.issuperset(ids):
                continue
            wrong = next(number for number in ids if number not in known)
            place = record.prompt.place or f"prompt {record.prompt.prompt_id}"
            raise RecordError(
                f"{place}: field {name!r}: got the id {wrong}, which no token of the tokenizer of "
                f"model.path has; allowed: ids of its {len(known)} tokens, {max(known)} at most; "
                "set model.path to the model that wrote the records, or leave prompt_ids, "
                "response_ids, ids_A and ids_B out of them to go by the text"
            )


def _list_ids(record: Any) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the ids of a record, with the name of the field that they stand in."""
    yield "prompt_ids", record.prompt_ids
    if isinstance(record, Sample):
        yield "response_ids", record.response_ids
    elif isinstance(record, Preference):
        for one in (record.chosen, record.rejected):
            yield "ids_A or ids_B", one.ids
    else:
        yield "response_ids", record.completion.ids
