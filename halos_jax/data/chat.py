"""The one renderer from conversations to token ids, for sampler, reward model and trainer alike.

A chat template is text of somebody else's making. Everything here is found by rendering it:
what it puts before an answer, what it puts after one, and how long it is without any content.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from halos_jax.config import ConfigError
from halos_jax.data.channels import find_lead, take_content
from halos_jax.data.fields import RecordError, shorten
from halos_jax.data.guard import Guard
from halos_jax.data.records import digest
from halos_jax.data.truncate import truncate_turns
from halos_jax.data.turns import drop_keys, make_messages, unpack
from halos_jax.types import Turn

logger = logging.getLogger(__name__)

# The format of HALOs for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

# Llama 3 templates print the day's date unless given one; a run resumed tomorrow must not change.
_DATE = "26 Jul 2024"
_PROBE = Turn("user", "x")
_SENTINEL = "HALOSSENTINEL"


def make_default_template(tokenizer: Any) -> str:
    """Return the template of a tokenizer without one, with a BOS where the tokenizer adds one.

    Who renders by the template has the same tokens then: no tokenizer adds a BOS behind it.
    """
    return "{{ bos_token }}" + DEFAULT_TEMPLATE if _adds_bos(tokenizer) else DEFAULT_TEMPLATE


def _adds_bos(tokenizer: Any) -> bool:
    first = tokenizer("x", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def make_renderer(tokenizer: Any, eos_token_ids: Iterable[int] | int | None = ()) -> "Renderer":
    """Make the renderer of a Hugging Face tokenizer.

    Args:
      tokenizer: with a chat template or, failing that, to be used with `DEFAULT_TEMPLATE`.
      eos_token_ids: further end tokens (`eos_token_id` of the model's generation_config.json).
    """
    further = (eos_token_ids,) if isinstance(eos_token_ids, int) else eos_token_ids or ()
    return Renderer(tokenizer, further)


class Renderer:
    """Turns conversations into token ids, and sampled ids back into text.

    Special tokens are the template's to set: where a content spells one it is text (see `guard`).

    Attributes:
      tokenizer: the Hugging Face tokenizer.
      template: the Jinja chat template in use.
      end_marker: what ends an assistant's turn, e.g. "<|im_end|>".
      stop_ids: tokens that end a response.
      stop_strings: the end marker, where it is neither a token nor ends with an end token.
      new_tokens: added tokens that the model has not been trained on.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Iterable[int]):
        self.tokenizer = tokenizer
        self.new_tokens: tuple[str, ...] = ()
        has_template = bool(tokenizer.chat_template)
        self.template: str = (
            tokenizer.get_chat_template() if has_template else make_default_template(tokenizer)
        )
        if "strftime_now" in self.template and "date_string" not in self.template:
            logger.warning(
                "the chat template prints the current date: prompts change from day to day"
            )
        self._guard = Guard(tokenizer)
        self._header = self._render((_PROBE,), generate=True)
        self._header_ids = self._encode(self._header)
        self._tail = self._find_tail()
        # Rendering is slow; a template that leaves these as they are leaves every answer so.
        self._is_verbatim = False
        probes = ("x", " x ", "\n\tx\n\n", "<think>x</think>\n\ny", "")
        self._is_verbatim = all(self._body(probe) == probe for probe in probes)
        self._lead = self._find_lead()
        self.end_marker: str = self._tail.rstrip() or tokenizer.eos_token or ""
        if not self.end_marker:
            raise ConfigError(
                "model.chat_template: got a template without a marker after the assistant's turn, "
                "and the tokenizer has no eos token; allowed: at least one of them, or no response "
                "would ever end"
            )
        stops = {int(token) for token in eos_token_ids}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        marker = self._encode(self.end_marker.strip())
        if len(marker) == 1:
            stops.add(marker[0])
        self.stop_ids: frozenset[int] = frozenset(stops)
        self.stop_strings: tuple[str, ...] = () if marker[-1] in stops else (self.end_marker,)

    @property
    def pad_id(self) -> int | None:
        """The token to pad with: the tokenizer's if it ends no response, else its BOS, else none.

        A classifier of transformers reads its score at the last token that is not this one.
        """
        own = (self.tokenizer.pad_token_id, self.tokenizer.bos_token_id)
        return next((i for i in own if i is not None and i not in self.stop_ids), None)

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
          ConfigError: where the template alone is longer than `max_length`.
          ValueError: where there are no turns.
          RecordError: where the template refuses them.
        """
        return next(self.render_prompts([turns], max_length))

    def render_prompts(
        self, prompts: Iterable[Sequence[Turn]], max_length: int
    ) -> Iterator[tuple[int, ...]]:
        """Yield `render_prompt` of each prompt; they are tokenized many at a time."""
        first, second = itertools.tee(prompts)
        texts = (self._render(turns, generate=True) for turns in _refuse_empty(first))
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
            self._body(text) + (self.end_marker if finished else "") for text, finished in texts
        )

    def render_texts(self, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """Yield the ids of plain texts, special tokens as such, each with its beginning and end.

        BOS and EOS stand once, where the tokenizer adds the one and has the other.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        begins = _adds_bos(self.tokenizer)
        for ids in self._guard.encode_all(texts):
            first = [bos] if begins and ids[:1] != [bos] else []
            last = [eos] if eos is not None and ids[-1:] != [eos] else []
            yield (*first, *ids, *last)

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
        # Some decoders eat the first space of what they are given: let them eat from a known text.
        anchor = self._encode(_PROBE.content)
        text = self._decode(anchor + ids)[len(self._decode(anchor)) :]
        for stop in () if keep_marker else self.stop_strings:
            text = text.removesuffix(stop)
        return text

    def show(self, turns: Sequence[Turn]) -> str:
        """Return turns and the header of an answer as the template writes them.

        Raises:
          RecordError: where the template refuses them.
        """
        return self._render(turns, generate=True)

    def _render(self, turns: Sequence[Turn], *, generate: bool) -> str:
        try:
            try:
                return self._apply_template(turns, generate)
            except TypeError:
                if not any("tool_calls" in turn.further for turn in turns):
                    raise
                # Some templates print the arguments of a call as the text that they take them for.
                return self._apply_template(turns, generate, spell_calls=True)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise RecordError(
                f"the chat template refuses turns of the roles {roles}: {error}"
            ) from error

    def _apply_template(
        self, turns: Sequence[Turn], generate: bool, *, spell_calls: bool = False
    ) -> str:
        messages, context = make_messages(turns, self._guard.hide, spell_calls=spell_calls)
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=generate,
            tokenize=False,
            date_string=_DATE,
            **context,
        )

    def _prompt_ids(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        return next(self._encode_prompts([self._render(turns, generate=True)]))

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

    def _find_tail(self) -> str:
        text = self._render((_PROBE, Turn("assistant", _SENTINEL)), generate=False)
        if _SENTINEL not in text:
            raise ConfigError(
                "model.chat_template: got a template that leaves out what the assistant says; "
                "allowed: one that shows every turn"
            )
        return text.rpartition(_SENTINEL)[2]

    def _find_lead(self) -> tuple[int, ...]:
        beginning, found, _ = self._body(_SENTINEL).partition(_SENTINEL)
        added = self.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        lead = find_lead(self._encode(beginning), special) if found else ()
        if lead:
            logger.info(
                "the chat template begins answers by %r: the text of one that has several messages "
                "is what follows the last of these; training sees all of its tokens",
                beginning,
            )
        return lead

    def _body(self, answer: str | Turn) -> str:
        """Return an answer as the template sets it between header and end marker.

        Raises:
          RecordError: where the template shows a turn with further keys in no place behind a
            header, or does not show one of them.
        """
        if isinstance(answer, Turn) and answer.further:
            return self._body_of_turn(answer)
        text = answer.content if isinstance(answer, Turn) else answer
        if self._is_verbatim:
            return self._guard.hide(text)
        whole = self._render((_PROBE, Turn("assistant", text)), generate=False)
        if whole.startswith(self._header) and whole.endswith(self._tail):
            return whole[len(self._header) : len(whole) - len(self._tail)]
        # Templates that write one header to sample from and another into the history.
        return self._guard.hide(text)

    def _body_of_turn(self, answer: Turn) -> str:
        whole = self._render((_PROBE, answer), generate=False)
        for name, less in drop_keys(answer):
            if self._render((_PROBE, less), generate=False) == whole:
                raise RecordError(
                    f"the chat template does not show {name!r} of an answer, which would be "
                    "learned without it; allowed: a template that does (model.chat_template), or "
                    f"records without {name!r}"
                )
        if not (whole.startswith(self._header) and whole.endswith(self._tail)):
            raise RecordError(
                f"the chat template writes an answer with {', '.join(unpack(answer))} as "
                f"{shorten(whole)}, allowed: {self._header!r} before it, {self._tail!r} at its end"
            )
        return whole[len(self._header) : len(whole) - len(self._tail)]

    def _encode_behind_header(self, texts: Iterable[str]) -> Iterator[tuple[int, ...]]:
        """Tokenize texts as they stand behind a header, where that splits tokens at its start."""
        first, second = itertools.tee(texts)
        start, wholes = len(self._header_ids), (self._header + text for text in second)
        for text, whole in zip(first, self._guard.encode_all(wholes), strict=True):
            behind = whole[:start] == self._header_ids
            yield tuple(whole[start:] if behind else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return self._guard.encode(text)

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def _refuse_empty(prompts: Iterable[Sequence[Turn]]) -> Iterator[Sequence[Turn]]:
    for turns in prompts:
        if not turns:
            raise ValueError("turns: got an empty conversation, allowed: one turn or more")
        yield turns
