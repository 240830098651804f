"""What this package needs of a Hugging Face tokenizer, which `transformers` does not type."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload

from halos_jax.json_text import JsonObject


class AddedToken(Protocol):
    """A token that is matched as a whole, before the text is split into pieces."""

    content: str
    lstrip: bool
    rstrip: bool
    special: bool


class Tokenizer(Protocol):
    """A tokenizer; see `transformers.PreTrainedTokenizerBase`.

    Attributes:
      name_or_path: the folder or hub id that it was loaded from.
      chat_template: one template, or several by name.
      added_tokens_decoder: id -> added token.
      is_fast: whether it knows which characters a token stands for.
    """

    name_or_path: str
    chat_template: str | dict[str, str] | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    @property
    def all_special_tokens(self) -> list[str]: ...
    @property
    def is_fast(self) -> bool: ...

    def __call__(self, text: str | list[str], **options: bool) -> Mapping[str, Any]:
        """Encode one text or several; "input_ids" are the ids of each."""
        ...

    def apply_chat_template(self, messages: list[JsonObject], **options: Any) -> Any:
        """Render messages as text, or as ids."""
        ...

    def get_vocab(self) -> dict[str, int]: ...
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int: ...
    def decode(self, token_ids: Sequence[int], **options: bool) -> str: ...
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]: ...
