"""From a source of records to the items that a loss trains on."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from halos_jax.config.kinds import ITEM_KINDS, ItemKind
from halos_jax.config.tasks import load
from halos_jax.data import datasets
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import make_shown
from halos_jax.data.lengths import Cuts, Lengths
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.data.records.reading import OnBad
from halos_jax.data.records.unread import Skips
from halos_jax.data.selection import ALL, Selection
from halos_jax.data.token_ids import Feedback, check_ids
from halos_jax.types import Completion, Demonstration, Item, Judgement, Preference, Sample

logger = logging.getLogger(__name__)

_Record = TypeVar("_Record", Demonstration, Preference, Judgement, Sample)
_Given = TypeVar("_Given")

SMALLEST_CLASS = 0.05  # share of the answers below which a class is too small to learn from
_LOOKS = 32  # outputs whose tokens are checked


def load_items(
    kind: ItemKind,
    source: str,
    renderer: Renderer,
    lengths: Lengths,
    selection: Selection = ALL,
    *,
    control: tuple[str, str] = ("", ""),
    check_tokens: bool = False,
) -> list[Item]:
    """Load the records of `source` as items of one kind (`Loss.items`).

    Args:
      source: files or hub data sets, see `sources.read_sources`.
      selection: which records to take.
      control: for "controlled", the control tokens of desirable answers and of others.
      check_tokens: check that token ids in the records belong to this renderer's tokenizer.

    Raises:
      RecordError: for a bad record, one that does not suit the kind, or tokens of another model.
      ConfigError: if a prompt leaves no room for a response.
    """
    spec = ITEM_KINDS[kind]
    if spec.scored_as and datasets.has_scores(source, selection):
        spec = ITEM_KINDS[spec.scored_as]
    make = load(spec.make)
    if spec.has_control:
        make = functools.partial(make, control=control)
    if spec.takes_all:
        selection = dataclasses.replace(selection, every_output=True)
    loading = _Loading(source, renderer, lengths, selection, check_tokens)
    return loading.make(load(spec.load), make)


class _Make(Protocol[_Given]):
    """Makes items from records, see `tokenize`; `on_bad` gets the errors of bad records."""

    def __call__(
        self, records: list[_Given], renderer: Renderer, lengths: Lengths, *, on_bad: OnBad
    ) -> list[Item]: ...


@dataclasses.dataclass(frozen=True)
class _Loading:
    """The arguments of `load_items` for one source."""

    source: str
    renderer: Renderer
    lengths: Lengths
    selection: Selection
    check_tokens: bool

    def make(
        self, load: Callable[[str, Selection], list[_Record]], make: _Make[_Record]
    ) -> list[Item]:
        """Return the items of the source; log what is cut and which records are left out."""
        source, renderer = self.source, self.renderer
        skips = Skips(allowed=self.selection.edits.skip)
        found = load(source, self.selection)
        if self.check_tokens:
            found = check_ids(found, renderer, skips.add)
            skips.require(source, len(found))
        if self.check_tokens and not self.selection.collapse:
            _check_tokens(found, source, renderer)
        if self.check_tokens:
            _warn_of_answers(found, source)
        counting = dataclasses.replace(self.lengths, cuts=Cuts())
        items = make_shown(
            lambda records: make(records, renderer, counting, on_bad=skips.add),
            found,
            renderer,
            skip=self.selection.edits.skip,
        )
        skips.require(source, len(items))
        counting.report(source)
        skips.report(source, len(items), "items")
        return items


def _warn_of_answers(records: Sequence[Feedback], source: str) -> None:
    """Warn of answers without any text, and of pairs of two equal answers."""
    empty = sum(not text for record in records for text in _list_texts(record))
    pairs = [one for one in records if isinstance(one, Preference)]
    equal = sum(one.chosen.turns == one.rejected.turns for one in pairs)
    if empty:
        logger.warning(
            "%s: %d answers have no text: a model that learns one learns to end at once; "
            "data.map=module:function can leave records out",
            source,
            empty,
        )
    if equal:
        logger.warning(
            "%s: %d of %d pairs have two equal answers, which say nothing of what is better",
            source,
            equal,
            len(pairs),
        )


def _list_texts(record: Feedback) -> Iterator[str]:
    """Yield the contents of each answer of a record: its text, tool calls and thoughts."""
    if isinstance(record, Sample):
        yield record.output
        return
    for one in _list_completions(record):
        yield "".join(turn.content + turn.further for turn in one.turns).strip()


def _check_tokens(records: Iterable[Feedback], source: str, renderer: Renderer) -> None:
    """Raise RecordError if token ids do not mean the text beside them.

    Then another tokenizer made them. One match among the first records is enough, since some texts
    may spell out special tokens.
    """
    outputs = (output for record in records for output in _list_outputs(record))
    known = (one for one in outputs if one[0] and one[1].strip())
    others = []
    for ids, text in itertools.islice(known, _LOOKS):
        shown = renderer.decode_response(ids)
        # A text may stop before its tokens do, at a stop string.
        if shown.strip().startswith(text.strip()):
            return
        others.append((shown, text))
    if others:
        shown, text = others[0]
        raise RecordError(
            f"{source}: got token ids that mean {shorten(shown)} to the tokenizer of model.path, "
            f"but the text beside them is {shorten(text)}; another model's made them; to train on "
            "the text, leave prompt_ids, response_ids, ids_A and ids_B out of the records"
        )


def _list_outputs(record: Feedback) -> Iterator[tuple[Sequence[int], str]]:
    """Yield (token ids, text) of the outputs of a record."""
    if isinstance(record, Sample):
        yield record.response_ids, record.output
        return
    for one in _list_completions(record):
        yield one.ids, "".join(turn.content for turn in one.turns)


def _list_completions(record: Demonstration | Preference | Judgement) -> tuple[Completion, ...]:
    if isinstance(record, Preference):
        return record.chosen, record.rejected
    return (record.completion,)


def warn_of_classes(items: Sequence[Item], source: str) -> None:
    """Warn if fixed data have few answers of one class, or none."""
    desirable = sum(item.desirable for item in items)
    fewer = min(desirable, len(items) - desirable)
    if fewer >= SMALLEST_CLASS * len(items):
        return
    kinds = ("desirable", "undesirable")
    few, many = kinds if fewer == desirable else kinds[::-1]
    logger.warning(
        "%s: %d of %d answers (%.1f %%) are %s, too few to learn from; add some, or keep fewer "
        "others by data.frac_unique_%s",
        source,
        fewer,
        len(items),
        100 * fewer / len(items),
        few,
        many,
    )
