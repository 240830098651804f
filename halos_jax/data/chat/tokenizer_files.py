"""The files of a tokenizer, checked before and after `transformers` reads them.

`transformers` fills in what is missing, converts what has a wrong type, and fails in many ways if
it cannot. Here every field that decides the tokens of a text is checked for its type, and the
tokenizer that comes out is compared with the files.
"""

import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from halos_jax.config import ConfigError
from halos_jax.data.chat.tokenizer import Tokenizer
from halos_jax.json_text import JsonObject, parse_json

logger = logging.getLogger(__name__)

_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"),
    "mask_token",
)
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_token(value: object) -> bool:
    """Return whether this is a token: its text, or an object with the text and flags."""
    if not isinstance(value, dict):
        return _is_text(value)
    flags = (value.get(name) for name in _FLAGS)
    return isinstance(value.get("content"), str) and all(map(_is_flag, flags))


def _is_tokens(value: Any) -> bool:
    found = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, list | dict) and all(map(_is_token, found)))


def _is_template(value: object) -> bool:
    """Return whether this is a template, or several with names, as a list or an object."""
    if isinstance(value, list):
        pairs = [one for one in value if isinstance(one, dict) and {*one} == {"name", "template"}]
        named = [part for pair in pairs for part in pair.values()]
        return len(pairs) == len(value) and all(isinstance(part, str) for part in named)
    if isinstance(value, dict):
        return all(isinstance(part, str) for part in value.values())
    return _is_text(value)


def _is_decoder(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(key, str) and key.isdecimal() for key in value)
        and all(isinstance(token, dict) and _is_token(token) for token in value.values())
    )


def _is_eos(value: object) -> bool:
    return value is None or _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_ids_by_token(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_id, value.values()))


def _is_length(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < 1e300)


_Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]
_TOKEN = ("a string, an object with 'content', or null", _is_token)
_TOKENS = ("a list or an object of tokens, or null", _is_tokens)
_FLAG, _TEXT = ("true, false or null", _is_flag), ("a string or null", _is_text)
_TEMPLATE = ("a string, or a list of objects with 'name' and 'template'", _is_template)
_OF_TOKENS = (_TOKEN, _TOKENS)
_KEYS = {"id", "content", "__type", *_FLAGS}  # the keys that an object for a token may have
_EOS = ("a token id (an integer of 0 or more), a list of them, or null", _is_eos)
# File -> field -> (allowed values, check). Fields that are not listed do not affect tokens.
_FILES: dict[str, _Fields] = {
    "tokenizer_config.json": {
        **dict.fromkeys(_SPECIAL, _TOKEN),
        **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), _FLAG),
        **dict.fromkeys(("split_special_tokens", "clean_up_tokenization_spaces"), _FLAG),
        **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), _TEXT),
        "added_tokens_decoder": ("an object from token ids to objects with 'content'", _is_decoder),
        "chat_template": _TEMPLATE,
        "model_max_length": ("a number above 0, or null", _is_length),
    },
    "special_tokens_map.json": {
        **dict.fromkeys(_SPECIAL, _TOKEN),
        "additional_special_tokens": _TOKENS,
    },
    "chat_template.json": {"chat_template": _TEMPLATE},
    "generation_config.json": {"eos_token_id": _EOS},
    "config.json": {"eos_token_id": _EOS},
}
_OTHER_IDS = {"bos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"}
# This file is read as a whole: each of its fields is a token.
_ADDED = "added_tokens.json"
_TOKENIZER = "tokenizer.json"


def open_tokenizer(path: str) -> Tokenizer:
    """Return the Hugging Face tokenizer of a folder or hub id; never runs remote code.

    Raises:
      ConfigError: naming the file, and the field in it, that cannot be used.
    """
    from transformers import AutoTokenizer  # Seconds to import, and few need it.

    files = {name: _read_object(path, name) for name in (*_FILES, _ADDED, _TOKENIZER)}
    _check_template_file(path)
    vocabulary = _read_vocabulary(path, files[_TOKENIZER])
    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the library raises for a damaged file
        reason = _find_missing(path) or f"{type(error).__name__}: {_first_line(error)}"
        raise ConfigError(
            f"model.tokenizer: got {path!r}, allowed: a folder or hub id with a Hugging Face "
            f"tokenizer that needs no remote code; {reason}"
        ) from error
    tokenizer = cast(Tokenizer, loaded)
    _compare(path, tokenizer, files, vocabulary)
    return tokenizer


def read_eos(path: str) -> tuple[int, ...]:
    """Return the end tokens of a model, from generation_config.json or else config.json.

    Raises:
      ConfigError: if a value there is not a token id.
    """
    for name in ("generation_config.json", "config.json"):
        read = _read_object(path, name) or {}
        inner = read.get("text_config") if name == "config.json" else None
        for place, fields in ((name, read), (f"{name}: text_config", inner)):
            found = fields.get("eos_token_id") if isinstance(fields, dict) else None
            if not _is_eos(found):
                raise _fault(path, place, "eos_token_id", found, _EOS[0])
            if found is not None and found != []:
                return tuple(found) if isinstance(found, list) else (found,)
    return ()


# --------------------------------------------------------------------------- files


def _find_file(path: str, name: str) -> Path | None:
    """Return the file `name` of a folder or hub id, or None if it has no such file."""
    if os.path.isdir(path):
        file = Path(path, name)
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such id, or no network: the library's error says more
        return None
    return Path(found) if found else None


def _read_object(path: str, name: str) -> JsonObject | None:
    file = _find_file(path, name)
    if file is None:
        return None
    try:
        read = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.tokenizer: {file}: cannot be read as JSON: {error}; copy it again"
        ) from error
    if not isinstance(read, dict):
        raise ConfigError(
            f"model.tokenizer: {file}: got {type(read).__name__}, allowed: an object; copy it again"
        )
    for field, (allowed, fits) in _FILES.get(name, {}).items():
        if not fits(read.get(field)):
            raise _fault(path, name, field, read[field], allowed)
    _warn_of_near(file, read)
    _warn_of_keys(file, read)
    if name == _ADDED and not _is_ids_by_token(read):
        raise _fault(path, name, "tokens", read, "an object from tokens to their ids")
    return read


def _warn_of_near(file: Path, read: Mapping[str, Any]) -> None:
    """Warn of fields that nothing reads, if they look like a misspelt field that is absent."""
    known = _FILES.get(file.name, {})
    absent = [name for name in known if read.get(name) is None]
    for name in read.keys() - known.keys() - _OTHER_IDS if absent else ():
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=0.9):
            logger.warning("%s: %r is not read; did you mean %r?", file, name, near[0])


def _warn_of_keys(file: Path, read: Mapping[str, Any]) -> None:
    """Warn of keys of tokens that nothing reads: a misspelt flag has no effect."""
    fields = [name for name, known in _FILES.get(file.name, {}).items() if known in _OF_TOKENS]
    values = [read.get(name) for name in (*fields, "added_tokens", "added_tokens_decoder")]
    tokens: list[Any] = []
    for value in values:
        inner = value.values() if isinstance(value, dict) and "content" not in value else None
        tokens += value if isinstance(value, list) else inner or [value]
    keys = {key for token in tokens if isinstance(token, dict) for key in token} - _KEYS
    if keys:
        logger.warning(
            "%s: keys of tokens that are not read: %s; the known ones are %s",
            file,
            ", ".join(sorted(map(repr, keys))),
            ", ".join(sorted(_KEYS)),
        )


def _check_template_file(path: str) -> None:
    file = _find_file(path, "chat_template.jinja")
    try:
        if file is not None and not file.read_bytes().decode("utf-8").strip():
            raise ConfigError(
                f"model.tokenizer: {file}: got an empty file, allowed: a Jinja template; copy it "
                "again, or remove it"
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.tokenizer: {file}: got a file that cannot be read ({error}), allowed: a Jinja "
            "template in UTF-8; copy it again, or set model.chat_template"
        ) from error


def _read_vocabulary(path: str, read: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the tokens of tokenizer.json with their ids; {} if there is no such file."""
    if read is None:
        return {}
    model = read.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # of a unigram model: pairs of a token and its score
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in found):
            raise _fault(path, _TOKENIZER, "model.vocab", found, "pairs of a token and its score")
        found = {pair[0]: number for number, pair in enumerate(found)}
    if not isinstance(found, dict) or not _is_ids_by_token(found):
        raise _fault(path, _TOKENIZER, "model.vocab", found, "an object from tokens to their ids")
    if len(set(found.values())) < len(found):
        by_id: dict[int, str] = {}
        for token, number in found.items():
            other = by_id.setdefault(number, token)
            if other != token:
                got = f"{number} for {other!r} and for {token!r}"
                raise _fault(path, _TOKENIZER, "model.vocab", got, "an id for each token")
    added = read.get("added_tokens") or []
    if not isinstance(added, list):
        raise _fault(path, _TOKENIZER, "added_tokens", added, "a list of objects, or null")
    for token in added:
        if not isinstance(token, dict) or not _is_token(token) or not _is_id(token.get("id")):
            allowed = "a list of objects with 'id' and 'content'"
            raise _fault(path, _TOKENIZER, "added_tokens", token, allowed)
    return {**found, **{token["content"]: token["id"] for token in added}}


def _fault(path: str, name: str, field: str, got: object, allowed: str) -> ConfigError:
    text = got if isinstance(got, str) and " for " in got else repr(got)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return ConfigError(
        f"model.tokenizer: {os.path.join(path, name)}: {field}: got {shown}, allowed: {allowed}; "
        "copy the file again from the model, or mend it"
    )


# --------------------------------------------------------------------------- the library


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _find_missing(path: str) -> str:
    """Return which packages are missing to read a folder that has only `tokenizer.model`; or ""."""
    file = _find_file(path, "tokenizer.model")
    if file is None or _find_file(path, _TOKENIZER) is not None:
        return ""
    with open(file, "rb") as stream:
        start = stream.read(64)
    # tiktoken's lines are base64 and a rank; sentencepiece's file is a protobuf message.
    is_tiktoken = start[:1] != b"\n" and b" " in start.partition(b"\n")[0]
    needed = {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece"}
    needed |= {} if is_tiktoken else {"google.protobuf": "protobuf"}
    absent = [package for module, package in needed.items() if not _is_installed(module)]
    if not absent:
        return ""
    return f"{file} is read with {' and '.join(absent)}: pip install {' '.join(absent)}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is absent
        return False


def _compare(
    path: str,
    tokenizer: Tokenizer,
    files: Mapping[str, JsonObject | None],
    vocabulary: Mapping[str, int],
) -> None:
    """Warn where the tokenizer that the library made differs from the files."""
    lines = list(_list_moved(tokenizer.get_vocab(), vocabulary)) if vocabulary else []
    config = files["tokenizer_config.json"] or {}
    listed = {token["content"] for token in (config.get("added_tokens_decoder") or {}).values()} | {
        *(files[_ADDED] or {})
    }
    for name in _SPECIAL:
        said = {
            file: _content(fields.get(name))
            for file in ("tokenizer_config.json", "special_tokens_map.json")
            if (fields := files[file]) and fields.get(name) is not None
        }
        used = getattr(tokenizer, name, None)
        lines += [
            f"{name} is {used!r}, and {file} says {token!r}"
            for file, token in said.items()
            if token != used
        ]
        if vocabulary and used is not None and used not in vocabulary and used not in listed:
            lines.append(f"{name}: {used!r} is no token of {_TOKENIZER}: it is added as a new one")
    for line in lines:
        logger.warning("%s: the tokenizer as transformers reads it: %s", path, line)


def _list_moved(found: Mapping[str, int], written: Mapping[str, int]) -> Iterator[str]:
    moved = [token for token, number in written.items() if found.get(token) != number]
    if moved:
        first = moved[0]
        yield (
            f"{len(moved)} tokens have other ids than in {_TOKENIZER}: {first!r} has "
            f"{found.get(first)}, there {written[first]}"
        )


def _content(token: object) -> Any:
    return token["content"] if isinstance(token, dict) else token
