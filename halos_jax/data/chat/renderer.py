"""The one renderer from conversations to token ids, for sampler, reward model and trainer alike."""

import functools
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from halos_jax.data.chat.channels import find_lead, take_content
from halos_jax.data.chat.guard import Guard
from halos_jax.data.chat.template import PROBE, Template, adds_bos
from halos_jax.data.chat.tokenizer import Tokenizer
from halos_jax.data.chat.truncate import truncate_turns
from halos_jax.data.records.formats import digest
from halos_jax.types import Turn

logger = logging.getLogger(__name__)


def make_renderer(
    tokenizer: Tokenizer,
    eos_token_ids: Iterable[int] | int | None = (),
    answer_tokens: Collection[str] = (),
) -> "Renderer":
    """Make the renderer of a Hugging Face tokenizer.

    Args:
      tokenizer: with a chat template or, failing that, to be used with `DEFAULT_TEMPLATE`.
      eos_token_ids: further end tokens (`eos_token_id` of the model's generation_config.json).
      answer_tokens: special tokens that are tokens in answers, too.
    """
    further = (eos_token_ids,) if isinstance(eos_token_ids, int) else eos_token_ids or ()
    return Renderer(tokenizer, further, answer_tokens)


class Renderer:
    """Turns conversations into token ids, and sampled ids back into text.

    Special tokens are the template's to set: where a content spells one it is text (see `guard`).

    Attributes:
      tokenizer: the Hugging Face tokenizer.
      template: the Jinja chat template in use.
      end_marker: what ends an assistant's turn, e.g. "<|im_end|>".
      closing: what the template writes behind that at a conversation's end, see `Template`.
      stop_ids: tokens that end a response.
      stop_strings: the end marker, where it is neither a token nor ends with an end token.
      origin: the folder, hub id or file that the template is from, for messages.
      new_tokens: added tokens that the model has not been trained on.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Iterable[int], answer_tokens: Collection[str]
    ):
        self.tokenizer = tokenizer
        self.origin: str = tokenizer.name_or_path
        self.new_tokens: tuple[str, ...] = ()
        self._guard = Guard(tokenizer)
        self._guard.allow(answer_tokens)
        self._answer_tokens = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content in answer_tokens
        }
        self._template = Template(tokenizer, self._guard)
        self.template = self._template.text
        self.end_marker, self.closing = self._template.end_marker, self._template.closing
        self._header_ids = self._encode(self._template.header)
        self._lead = self._find_lead()
        stops = {int(token) for token in eos_token_ids}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        marker = self._encode(self.end_marker.strip())
        if len(marker) == 1:
            stops.add(marker[0])
        self.stop_ids: frozenset[int] = frozenset(stops)
        self.stop_strings: tuple[str, ...] = () if marker[-1] in stops else (self.end_marker,)
        if self._template.is_default:
            self._name_default(len(marker))

    @property
    def pad_id(self) -> int | None:
        """The token to pad with: the tokenizer's if it ends no response, else its BOS, else none.

        A classifier of transformers reads its score at the last token that is not this one.
        """
        known = (self.tokenizer.pad_token_id, self.tokenizer.bos_token_id)
        own: list[int] = [number for number in known if number is not None]
        # What ends a response is no matter where the template writes more behind it.
        last = list(self.end_ids[-1:]) if self.closing else own
        choices = [*(i for i in own if i not in self.stop_ids), *(i for i in own if i not in last)]
        return next(iter(choices), None)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids of the end marker and what the template writes behind it at the very end.

        () where the marker is not a token by itself, or not the template's.
        """
        marker = self.end_marker
        if self.closing is None or marker != marker.strip() or len(self._encode(marker)) != 1:
            return ()
        return tuple(self._encode(marker + self.closing))

    @functools.cached_property
    def token_ids(self) -> frozenset[int]:
        """The ids of the tokenizer's tokens, and those that end a response of the model."""
        return frozenset(self.tokenizer.get_vocab().values()) | self.stop_ids

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, template and markers: equal where token ids mean the same."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        tokens = [self.tokenizer.bos_token, self.end_marker]
        return digest(vocabulary, self.template, tokens)

    def render_prompt(self, turns: Sequence[Turn], max_length: int) -> tuple[int, ...]:
        """Return the ids of `turns` and the header of an answer, at most `max_length` of them.

        What does not fit is cut as `truncate_turns` says. BOS stands once where the template has
        it, or where a tokenizer without a template adds it by itself.

        Raises:
          ConfigError: if the template alone is longer than `max_length`.
          ValueError: if there are no turns.
          RecordError: if the template refuses them.
        """
        return next(self.render_prompts([turns], max_length))

    def render_prompts(
        self, prompts: Iterable[Sequence[Turn]], max_length: int
    ) -> Iterator[tuple[int, ...]]:
        """Yield `render_prompt` of each prompt; they are tokenized many at a time."""
        first, second = itertools.tee(prompts)
        texts = (self._template.render(turns, generate=True) for turns in _refuse_empty(first))
        for turns, ids in zip(second, self._encode_prompts(texts), strict=True):
            fits = len(ids) <= max_length
            yield ids if fits else self._prompt_ids(self.truncate_turns(turns, max_length))

    def truncate_turns(self, turns: Sequence[Turn], max_length: int) -> tuple[Turn, ...]:
        """Return the turns of which `render_prompt` makes at most `max_length` ids.

        What goes first stands with `truncate.truncate_turns`.
        """
        [turns] = map(tuple, _refuse_empty([turns]))
        return truncate_turns(
            turns,
            max_length,
            measure=lambda some: len(self._prompt_ids(some)),
            find_starts=self._token_starts,
            template=f"the chat template of {self.origin}",
        )

    def render_response(self, text: str | Turn, *, finished: bool = True) -> tuple[int, ...]:
        """Return the ids of an assistant's turn, to stand behind those of `render_prompt`.

        Args:
          text: the content of the turn; the turn, where it says more (calls of tools, reasoning).
          finished: whether the turn ended by itself; one that was cut gets no end marker.
        """
        return next(self.render_responses([(text, finished)]))

    def render_responses(
        self, texts: Iterable[tuple[str | Turn, bool]]
    ) -> Iterator[tuple[int, ...]]:
        """Yield `render_response` of each (text, finished); they are tokenized many at a time."""
        return self._encode_behind_header(
            self._template.write_answer(text) + (self.end_marker if finished else "")
            for text, finished in texts
        )

    def render_texts(self, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """Yield the ids of plain texts, special tokens as such, each with its beginning and end.

        BOS and EOS stand once, where the tokenizer adds the one and has the other.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        begins = adds_bos(self.tokenizer)
        for ids in self._guard.encode_all(texts):
            first = [bos] if begins and bos is not None and ids[:1] != [bos] else []
            last = [eos] if eos is not None and ids[-1:] != [eos] else []
            yield (*first, *ids, *last)

    def render_whole(self, conversations: Iterable[Sequence[Turn]]) -> Iterator[tuple[int, ...]]:
        """Yield the ids of conversations that have ended, as the template writes them."""
        texts = (self._template.render(turns, generate=False) for turns in conversations)
        yield from map(tuple, self._guard.encode_all(texts))

    def writes_plainly(self, turns: Sequence[Turn]) -> bool:
        """Tell whether the template writes the last turn as it stands, behind the header."""
        if self._template.is_verbatim and not turns[-1].further:
            return True
        text = self._guard.hide_answer(turns[-1].content) + self.end_marker + (self.closing or "")
        header = self._template.render(turns[:-1], generate=True)
        return self._template.render(turns, generate=False) == header + text

    def render_prefix(self, text: str) -> tuple[int, ...]:
        """Return the ids of what begins an answer for the model, special tokens in it as such."""
        return next(self._encode_behind_header([text])) if text else ()

    def decode_response(self, ids: Sequence[int], *, keep_marker: bool = False) -> str:
        """Return a response's text without special tokens and end marker; whitespace is kept.

        Of several messages that is the last, see `channels`; where none is meant for the reader,
        all are shown with their special tokens. `keep_marker` leaves an end marker that is no token
        of its own, for a search for it, and all messages.
        """
        ids = list(ids)
        while ids and ids[-1] in self.stop_ids:
            ids.pop()
        if self._lead and not keep_marker:
            content = take_content(ids, self._lead)
            if content is None:
                return self._decode(ids, skip_special_tokens=False)
            ids = content
        text = self._decode_content(ids)
        for stop in () if keep_marker else self.stop_strings:
            text = text.removesuffix(stop)
        return text

    def show(self, turns: Sequence[Turn]) -> str:
        """Return turns and the header of an answer as the template writes them.

        Raises:
          RecordError: if the template refuses them.
        """
        return self._template.render(turns, generate=True)

    def _prompt_ids(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        return next(self._encode_prompts([self._template.render(turns, generate=True)]))

    def _encode_prompts(self, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """Yield the ids of rendered prompts."""
        yield from map(tuple, self._guard.encode_all(texts))

    def _token_starts(self, text: str) -> list[int]:
        """Return the characters at which tokens of `text` start, ascending."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return sorted({start for start, _ in encoded["offset_mapping"]} | {0})

    def _find_lead(self) -> tuple[int, ...]:
        added = self.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        lead = find_lead(self._encode(self._template.lead), special)
        if lead:
            logger.info(
                "the chat template begins answers by %r: the text of one that has several messages "
                "is what follows the last of these; training sees all of its tokens",
                self._template.lead,
            )
        return lead

    def _name_default(self, cost: int) -> None:
        """Say that the tokenizer has no template, and what its markers cost."""
        tokens = "('<|im_start|>','<|im_end|>')"
        advice = (
            f'; --config.model.added_tokens="{tokens}" makes it 1, at which generation elsewhere '
            "ends, too"
        )
        logger.log(
            logging.WARNING if cost > 1 else logging.INFO,
            "the tokenizer %r has no chat template, so the default one is used (ChatML's markers): "
            "%r is %d token%s here%s",
            self.tokenizer.name_or_path,
            self.end_marker,
            cost,
            "s" if cost > 1 else "",
            advice if cost > 1 else "",
        )

    def _encode_behind_header(self, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """Tokenize texts as they stand behind a header, where that splits tokens at its start."""
        first, second = itertools.tee(texts)
        start, wholes = len(self._header_ids), (self._template.header + text for text in second)
        for text, whole in zip(first, self._guard.encode_all(wholes), strict=True):
            behind = whole[:start] == self._header_ids
            yield tuple(whole[start:] if behind else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return self._guard.encode(text)

    def _decode_content(self, ids: Sequence[int]) -> str:
        """Return a text without special tokens but those that answers may have."""
        # Some decoders eat the first space of what they are given: let them eat from a known text.
        anchor = self._encode(PROBE.content)
        start, text = len(self._decode(anchor)), ""
        for is_kept, run in itertools.groupby(ids, self._answer_tokens.__contains__):
            if is_kept:
                text += "".join(map(self._answer_tokens.__getitem__, run))
            else:
                text += self._decode([*anchor, *run])[start:]
        return text

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def _refuse_empty(prompts: Iterable[Sequence[Turn]]) -> Iterator[Sequence[Turn]]:
    for turns in prompts:
        if not turns:
            raise ValueError("turns: got an empty conversation, allowed: one turn or more")
        yield turns
