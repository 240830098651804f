"""Files beside an exported model's weights with which servers run it exactly as it was trained.

generation_config.json    the tokens that end an answer, or the texts if no token does
config.json               the same tokens, for programs that read only this file
chat_template.jinja       the template that the model was trained with, even if it is the default
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halos_jax.data.chat.renderer import Renderer
from halos_jax.models.files.folders import write_json
from halos_jax.once import say_once
from halos_jax.rewards.read_at import READ_AT

logger = logging.getLogger(__name__)

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


def write_stops(folder: Path, renderer: Renderer) -> None:
    """Write the tokens or texts that end an answer of `renderer` into the model folder.

    Ids that are in the folder's files already stay there, first and in their order. Without a
    generation_config.json transformers reads config.json, so a new file copies its tokens.
    """
    config = _read_config(folder)
    generation = _read_object(folder / GENERATION)
    found, strings = config if generation is None else generation, renderer.stop_strings
    own = _list_ids(found.get("eos_token_id"))
    ends = [*own, *sorted(renderer.stop_ids - set(own))]
    texts = found.get("stop_strings") or ()
    texts = list(dict.fromkeys([*([texts] if isinstance(texts, str) else texts), *strings]))
    if ends != own or strings:
        made = dict(_take_tokens(config, renderer) if generation is None else generation)
        made.pop("_from_model_config", None)  # it is no longer what config.json alone would give
        made |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
        made |= {"stop_strings": texts} if texts else {}
        write_json(folder / GENERATION, made)
    if set(ends) - set(_list_ids(config.get("eos_token_id"))):
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        write_json(folder / "config.json", config)
    if ends != own:
        names = renderer.tokenizer.convert_ids_to_tokens(ends[len(own) :])
        logger.info(
            "export: answers end with %s, too: added to %s", ", ".join(map(repr, names)), GENERATION
        )
    if strings:
        say_once(
            logger,
            "export: answers end with the text %r, which is no token of this tokenizer: it is "
            "among the stop_strings of %s, which generate(..., tokenizer=tokenizer) of "
            "transformers heeds; give it to other servers as a stop string, or train with "
            "--config.model.added_tokens",
            strings[0],
            GENERATION,
        )


def write_place(folder: Path, renderer: Renderer, read_at: str) -> None:
    """Record the token at which a classifier that was trained here has its score.

    Args:
      read_at: `reward.read_at` of the run that trained it.
    """
    config = _read_config(folder)
    closed = len(renderer.end_ids) > 1 and read_at != "end_of_turn"
    write_json(
        folder / "config.json", config | {READ_AT: "template_end" if closed else "end_of_turn"}
    )
    if not closed and renderer.closing != "":
        behind = repr(renderer.closing) if renderer.closing else "no end marker"
        say_once(
            logger,
            "export: the reward model was trained to be read at %r, but its chat template writes "
            "%s at a conversation's end: to score with it elsewhere, end texts with %r",
            renderer.end_marker,
            behind,
            renderer.end_marker,
        )


def write_template(folder: Path, template: str) -> None:
    """Write the chat template into every file of the folder that holds a chat template."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    older = folder / "chat_template.json"
    if older.exists():
        write_json(older, {"chat_template": template})
    settings = _read_object(folder / "tokenizer_config.json")
    if settings and "chat_template" in settings:
        settings["chat_template"] = template
        write_json(folder / "tokenizer_config.json", settings)


def copy_to_adapter(folder: Path, adapter: Path) -> None:
    """Copy the generation config and chat template into the adapter's folder.

    A server of base and adapter would otherwise take them from the base, which lacks them. The
    tokenizer is not copied: PEFT would shrink the base's vocabulary to it.
    """
    for name in (GENERATION, TEMPLATE):
        if (folder / name).exists():
            shutil.copyfile(folder / name, adapter / name)


def _take_tokens(config: dict[str, Any], renderer: Renderer) -> dict[str, Any]:
    """Return the other special tokens that transformers would take from config.json."""
    taken = {}
    for name in ("bos_token_id", "pad_token_id"):
        value = config.get(name)
        value = getattr(renderer.tokenizer, name) if value is None else value
        if value is not None:
            taken[name] = value
    return taken


def _list_ids(value: Sequence[int] | int | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model that has just been written."""
    config = _read_object(folder / "config.json")
    if config is None:
        raise RuntimeError(f"{folder / 'config.json'} is not what the export has written")
    return config


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file, or it holds none."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s), so it is replaced", file.name, error)
        return None
    return read if isinstance(read, dict) else None
