"""Where a renderer comes from: a folder's or hub id's tokenizer, its template, its end tokens."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from halos_jax.config import ConfigError, ModelConfig
from halos_jax.data.chat import Renderer, make_renderer


def load_tokenizer(path: str, chat_template: str = "") -> Any:
    """Load a Hugging Face tokenizer from a local folder or hub id; never runs remote code.

    Args:
      path: the folder or id.
      chat_template: a Jinja file that replaces the tokenizer's own template.

    Raises:
      ConfigError: where there is no usable tokenizer, or no such template file.
    """
    from transformers import AutoTokenizer  # Seconds to import, and the renderer does not need it.

    if not path:
        raise ConfigError(
            "model.tokenizer: got '', allowed: a folder or hub id; set it or model.path"
        )
    if os.path.isabs(path) and not os.path.isdir(path):
        raise ConfigError(
            f"model.tokenizer: got {path!r}, but there is no such folder; check the path"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"model.tokenizer: got {path!r}, allowed: a folder or hub id with a Hugging Face "
            f"tokenizer that needs no remote code; {reason}"
        ) from error
    if chat_template:
        try:
            with open(chat_template, encoding="utf-8") as stream:
                tokenizer.chat_template = stream.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.chat_template: got {chat_template!r}, allowed: a Jinja file in UTF-8; "
                f"{error}"
            ) from error
    return tokenizer


def load_renderer(path: str, chat_template: str = "") -> Renderer:
    """Load the tokenizer of `path` and make its renderer, end tokens of its generation config too.

    Raises:
      ConfigError: as `load_tokenizer`.
    """
    return make_renderer(load_tokenizer(path, chat_template), _read_eos(path))


def load_policy_renderer(settings: ModelConfig) -> Renderer:
    """Load the renderer of the model that is trained: its tokenizer with `settings.added_tokens`.

    The end tokens are those of the model's folder, whoever's the tokenizer is.

    Raises:
      ConfigError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(settings.tokenizer or settings.path, settings.chat_template)
    new = _add_tokens(tokenizer, settings.added_tokens)
    if new and settings.tokenizer:
        # What the model's own tokenizer has, the model was trained on in an earlier run.
        with contextlib.suppress(ConfigError):
            new -= load_tokenizer(settings.path).get_vocab().keys()
    renderer = make_renderer(tokenizer, _read_eos(settings.path))
    renderer.new_tokens = tuple(sorted(new, key=settings.added_tokens.index))
    return renderer


def _add_tokens(tokenizer: Any, tokens: Sequence[str]) -> set[str]:
    """Add special tokens to the tokenizer, in this order; return those that it did not have."""
    from transformers import AddedToken

    known = tokenizer.get_vocab().keys()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    return set(new)


def _read_eos(path: str) -> list[int] | int | None:
    """Return the end tokens of a model, which generation_config.json says, or else config.json."""
    from transformers import GenerationConfig, PretrainedConfig

    try:
        return GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):  # a model need not have one
        pass
    try:
        return PretrainedConfig.get_config_dict(path)[0].get("eos_token_id")
    except (OSError, ValueError):
        return None
