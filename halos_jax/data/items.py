"""From a source of records to the items of an objective, whatever it trains on."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from halos_jax.data import datasets
from halos_jax.data.chat.renderer import Renderer
from halos_jax.data.chat.template_door import make_shown
from halos_jax.data.conversations import make_target_items
from halos_jax.data.datasets import ALL, Selection
from halos_jax.data.lengths import Cuts, Lengths
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.data.token_ids import check_ids
from halos_jax.data.tokenize import (
    make_answer_items,
    make_controlled_items,
    make_pair_items,
    make_scored_items,
    make_unpaired_items,
)
from halos_jax.losses.registry import Items
from halos_jax.losses.unpaired import suggest_weights
from halos_jax.types import Demonstration, Item, Judgement, Preference, Sample

logger = logging.getLogger(__name__)

SMALLEST_CLASS = 0.05  # share of the answers below which a class is too small to learn from
_LOOKS = 32  # outputs whose tokens are looked at


def load_items(
    kind: Items,
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
      selection: what of it to take.
      control: of "controlled", what begins desirable answers and others.
      check_tokens: see that token ids in the records are of this renderer's tokenizer.

    Raises:
      RecordError: for a bad record, one that does not suit the kind, or tokens of another model.
      ConfigError: where a prompt leaves no room for a response.
    """
    scored = kind == "answer" and datasets.has_scores(source, selection)
    load, make = _READERS["group" if scored else kind]
    found = load(source, selection)
    if check_tokens:
        check_ids(found, renderer)
    if check_tokens and not selection.collapse:
        _check_tokens(found, source, renderer)
    options = (control,) if kind == "controlled" else ()
    counting = dataclasses.replace(lengths, cuts=Cuts())
    items = make_shown(
        lambda records: make(records, renderer, counting, *options),
        found,
        renderer,
        skip=selection.edits.skip,
    )
    counting.report(source)
    return items


_READERS = {
    "target": (datasets.load_demonstrations, make_target_items),
    "pair": (datasets.load_preferences, make_pair_items),
    "group": (datasets.load_scored, make_scored_items),
    "answer": (datasets.load_judgements, make_answer_items),
    "controlled": (datasets.load_judgements, make_controlled_items),
    "unpaired": (datasets.load_judgements, make_unpaired_items),
}


def _check_tokens(records: Iterable[Any], source: str, renderer: Renderer) -> None:
    """Raise RecordError where token ids say something else than the text beside them.

    They do where another tokenizer made them. One match among the first is enough: who wrote the
    records may have shown some special token as text.
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


def _list_outputs(
    record: Sample | Preference | Judgement | Demonstration,
) -> Iterator[tuple[Sequence[int], str]]:
    """Yield (token ids, text) of the outputs of a record."""
    if isinstance(record, Sample):
        yield record.response_ids, record.output
        return
    is_pair = isinstance(record, Preference)
    for one in (record.chosen, record.rejected) if is_pair else (record.completion,):
        yield one.ids, "".join(turn.content for turn in one.turns)


def warn_of_classes(items: Sequence[Item], source: str) -> None:
    """Warn where fixed data have answers of one class alone, or few of the other."""
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


def report_balance(items: Sequence[Item], settings: Mapping[str, Any]) -> None:
    """Log how many answers are of each class, and better weights where KTO's do not balance them.

    Balanced is `w_D n_D / (w_U n_U)` within [1, 4/3] (Ethayarajh et al. 2024, equation 9).

    Args:
      items: of the kind "unpaired".
      settings: `config.loss`.
    """
    desirable = sum(item.desirable for item in items)
    undesirable = len(items) - desirable
    logger.info("%d desirable and %d undesirable answers", desirable, undesirable)
    kto = settings if settings.get("name") == "kto" else settings.get("kto")
    if kto is None or not (desirable and undesirable):
        return
    weights = [float(kto.get(f"{name}_weight", 1.0)) for name in ("desirable", "undesirable")]
    if min(weights) <= 0:  # one class is switched off on purpose
        return
    low, high = suggest_weights(desirable, undesirable)
    # Counts make fractions: a weight on the very limit may miss it in the last bit.
    if low * (1 - 1e-4) <= weights[0] / weights[1] <= high * (1 + 1e-4):
        return
    middle = 1.0 if low <= 1 <= high else (low * high) ** 0.5
    logger.warning(
        "desirable to undesirable answers weigh %.3g : 1 (number x weight), outside of 1 to 4/3; "
        "to balance them: loss.desirable_weight=%.3g loss.undesirable_weight=%.3g",
        weights[0] * desirable / (weights[1] * undesirable),
        max(middle, 1.0),
        max(1 / middle, 1.0),
    )
