"""Tells special tokens that a text spells from those that the chat template writes.

A template puts the contents of turns between its markers. If a content that spells a marker
("<|im_end|>") were tokenized as it is, it would end its turn and could speak in another role. So
such spellings are replaced by placeholders while the template is rendered, and become ordinary
tokens afterwards.
"""

import itertools
import logging
import re
from collections.abc import Collection, Iterable, Iterator

from halos_jax.data.chat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_OPEN, _CLOSE = (
    "\U000fd000",
    "\U000fd001",
)  # for private use: no text has them
_TOGETHER = 512  # texts that are tokenized at once: enough for many cores, few to hold
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]{{1,6}}){_CLOSE}")


class Guard:
    """Hides special tokens in contents, and encodes them as plain text.

    Tokens that are added but not special ("<think>" in some models) are left alone, since answers
    may contain them. A text without hidden tokens is encoded as usual. In others, each piece
    between two special tokens is encoded by itself. For byte-level tokenizers this is the same;
    others may put a token at the start of each piece.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._allowed: frozenset[str] = frozenset()
        added = tokenizer.added_tokens_decoder.values()
        self._tokens = {token.content: token for token in added if token.special and token.content}
        self._tokens = {text: self._tokens[text] for text in sorted(self._tokens, key=len)[::-1]}
        self._numbers = {text: number for number, text in enumerate(self._tokens)}
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._warned = False

    def allow(self, tokens: Iterable[str]) -> None:
        """Allow these tokens in the assistant's turns, since it is meant to learn them."""
        self._allowed |= self._tokens.keys() & set(tokens)

    def hide(self, content: str) -> str:
        """Return a content with each special token that it spells behind a placeholder."""
        return self._hide(content, frozenset())

    def hide_answer(self, content: str) -> str:
        """As `hide`, for an assistant's turn, in which allowed tokens stay."""
        return self._hide(content, self._allowed)

    def _hide(self, content: str, allowed: Collection[str]) -> str:
        def replace(found: re.Match[str]) -> str:
            token: str = found[0]
            if token in allowed:
                return token
            if not self._warned:
                self._warned = True
                logger.warning(
                    "a text spells the special token %r; it and others like it are read as plain "
                    "text",
                    token,
                )
            return f"{_OPEN}{self._numbers[token]}{_CLOSE}"

        return self._pattern.sub(replace, content)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text: its special tokens as such, hidden ones as text."""
        ids: list[int]
        if not _PLACEHOLDER.search(text):
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        ids = []
        start, strip = 0, False
        for found in self._pattern.finditer(text):
            token = self._tokens[found[0]]
            piece = text[start : found.start()]
            ids += self._encode_plain(piece, left=strip, right=token.lstrip)
            ids.append(self._tokenizer.convert_tokens_to_ids(found[0]))
            start, strip = found.end(), token.rstrip
        return ids + self._encode_plain(text[start:], left=strip, right=False)

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield `encode(text)` of each text, many at once, as fast tokenizers use all cores."""
        texts = iter(texts)
        while group := list(itertools.islice(texts, _TOGETHER)):
            plain = [text for text in group if not _PLACEHOLDER.search(text)]
            found = iter(self._encode_many(plain))
            yield from (
                self.encode(text) if _PLACEHOLDER.search(text) else next(found) for text in group
            )

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return found

    def _encode_plain(self, text: str, *, left: bool, right: bool) -> list[int]:
        """Encode a piece between two special tokens, which may take the space beside them."""
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        if not text:
            return []
        # A placeholder that the text itself contains stays as it is.
        names = dict(enumerate(self._tokens))
        text = _PLACEHOLDER.sub(lambda found: names.get(int(found[1]), found[0]), text)
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return ids
