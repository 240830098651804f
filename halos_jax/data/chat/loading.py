"""Loading a renderer: the tokenizer of a folder or hub id, its template and its end tokens."""

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2

from halos_jax.config import ConfigError, ModelConfig
from halos_jax.data.chat.bounded import apply_template
from halos_jax.data.chat.renderer import Renderer, make_renderer
from halos_jax.data.chat.template import choose_template, make_default_template
from halos_jax.data.chat.template_options import set_options
from halos_jax.data.chat.thoughts import find_thought
from halos_jax.data.chat.tokenizer import Tokenizer
from halos_jax.data.chat.tokenizer_files import open_tokenizer, read_eos
from halos_jax.data.records.fields import RecordError
from halos_jax.json_text import JsonObject

# Roles of conversations in which a template shows its markers; it may refuse some of them.
_FRAMES = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool"),
)


def load_tokenizer(path: str, chat_template: str = "") -> Tokenizer:
    """Load a Hugging Face tokenizer from a local folder or hub id; never runs remote code.

    Args:
      path: the folder or id.
      chat_template: one of the tokenizer's named templates, or a Jinja file, to use.

    Raises:
      ConfigError: if there is no usable tokenizer, no such template, or several and no default.
    """
    if not path:
        raise ConfigError(
            "model.tokenizer: got '', allowed: a folder or hub id; set it or model.path"
        )
    if os.path.isabs(path) and not os.path.isdir(path):
        raise ConfigError(
            f"model.tokenizer: got {path!r}, but there is no such folder; check the path"
        )
    tokenizer = open_tokenizer(path)
    # Where a folder has no tokenizer at all, transformers makes one without a single word.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ConfigError(
            f"model.tokenizer: got {path!r}, which has no tokenizer: it knows no text; allowed: a "
            "folder with tokenizer.json or tokenizer.model; copy those of the model that it was "
            "made from into it, or set --config.model.tokenizer=DIR"
        )
    tokenizer.chat_template = _read_template(tokenizer, chat_template) or None
    return tokenizer


def load_renderer(
    path: str,
    chat_template: str = "",
    options: Mapping[str, Any] | None = None,
    field: str = "model.chat_template_options",
) -> Renderer:
    """Load the tokenizer of `path` and make its renderer, end tokens of its generation config too.

    Args:
      options: of the chat template, see `template_options`; `field` is where they stand.

    Raises:
      ConfigError: as `load_tokenizer`, and for options that the template does not read.
    """
    tokenizer = load_tokenizer(path, chat_template)
    apply_options(tokenizer, options or {}, field)
    renderer = _make_renderer(tokenizer, path)
    renderer.origin = chat_template or path
    return renderer


def load_policy_renderer(settings: ModelConfig, control: Collection[str] = ()) -> Renderer:
    """Load the renderer of the policy: its tokenizer with `settings.added_tokens`.

    The end tokens come from the model's folder, even if the tokenizer is another one. Added tokens
    that are markers of the chat template or in `control` become special: a user's text that spells
    one stays plain text. The others are tokens in answers and, unless the tokenizer already has
    them as special tokens, in all other turns.

    Args:
      control: the control tokens, which tell the policy how to answer (`data.good_token`).

    Raises:
      ConfigError: as `load_renderer`.
    """
    tokenizer = load_tokenizer(settings.tokenizer or settings.path, settings.chat_template)
    markers = _find_markers(tokenizer, settings.added_tokens) | set(control)
    new = _add_tokens(tokenizer, settings.added_tokens, markers)
    if new and settings.tokenizer:
        # Tokens in the model's own tokenizer are not new: an earlier run has trained them.
        with contextlib.suppress(ConfigError):
            new -= load_tokenizer(settings.path).get_vocab().keys()
    apply_options(tokenizer, settings.chat_template_options)
    answers = [token for token in settings.added_tokens if token not in markers]
    renderer = _make_renderer(tokenizer, settings.path, answers)
    renderer.origin = settings.chat_template or tokenizer.name_or_path
    renderer.new_tokens = tuple(sorted(new, key=settings.added_tokens.index))
    return renderer


def _make_renderer(tokenizer: Tokenizer, path: str, answers: Collection[str] = ()) -> Renderer:
    """Make a tokenizer's renderer with the end tokens of the model at `path`."""
    try:
        return make_renderer(tokenizer, read_eos(path), answers)
    except RecordError as error:
        raise ConfigError(
            f"model.chat_template: got one, with the model {path!r}, that cannot show a question "
            f"and its answer ({error}); allowed: one that can; set "
            "--config.model.chat_template=FILE"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{error} (of the tokenizer in {tokenizer.name_or_path!r})") from error


def apply_options(
    tokenizer: Tokenizer, options: Mapping[str, Any], field: str = "model.chat_template_options"
) -> None:
    """Set options in the tokenizer's chat template, as `template_options.set_options` does.

    Raises:
      ConfigError: for an option that the template does not read, and where setting it there is not
        what passing it would be.
    """
    if not options:
        return
    options = _thaw(options)
    template = choose_template(tokenizer) or make_default_template(tokenizer)
    tokenizer.chat_template = set_options(template, options, field)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for count in (1, 2):
        chat: JsonObject = {"messages": turns[:count], "add_generation_prompt": count == 1}
        try:
            passed = apply_template(tokenizer, **chat, chat_template=template, **options)
            found = apply_template(tokenizer, **chat)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"{field}: got {options}, which the chat template does not take: {error}"
            ) from error
        if found != passed:
            raise ConfigError(
                f"{field}: got {options}, which this chat template does not take as defaults; give "
                "it a copy of the template that has them (model.chat_template)"
            )


def _thaw(value: object) -> Any:
    """Return a value of the config as plain dicts and lists, as templates expect them."""
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, (list, tuple)) else value


def _find_markers(tokenizer: Tokenizer, tokens: Collection[str]) -> set[str]:
    """Return which of the tokens the chat template writes around turns, whatever they say.

    The tags of a thought are not among them: they are a part of answers.
    """
    template = choose_template(tokenizer) or make_default_template(tokenizer)
    frames = []
    for roles in _FRAMES:
        turns = [{"role": role, "content": "\ue000"} for role in roles]
        for generate in (False, True):
            with contextlib.suppress(jinja2.TemplateError):
                chat = {"chat_template": template, "add_generation_prompt": generate}
                frames.append(apply_template(tokenizer, turns, **chat))
    found = {token for token in tokens if any(token in frame for frame in frames)}
    thoughts = {token: find_thought(token) for token in found}
    tags = {token for token, one in thoughts.items() if one.end_tag and one.end_tag in template}
    return found - tags


def _read_template(tokenizer: Tokenizer, name: str) -> str:
    """Return the template called `name` of the tokenizer's own, or that of the file `name`."""
    own = tokenizer.chat_template
    if not name or (isinstance(own, dict) and name in own):
        return choose_template(tokenizer, name)
    try:
        with open(name, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(map(repr, own)) if isinstance(own, dict) else ""
        others = f", or one of the tokenizer's own: {names}" if names else ""
        raise ConfigError(
            f"model.chat_template: got {name!r}, allowed: a Jinja file in UTF-8{others}; {error}"
        ) from error


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], special: Collection[str]) -> set[str]:
    """Add tokens to the tokenizer, in this order; return those that its vocabulary did not have.

    One that is a piece of the vocabulary becomes a token that stands for itself wherever it stands.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab().keys()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for token in (token for token in tokens if token not in added):
        made = AddedToken(token, special=token in special, normalized=False)
        tokenizer.add_tokens([made], special_tokens=token in special)
    return {token for token in tokens if token not in known}
