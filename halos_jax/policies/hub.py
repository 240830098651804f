"""An export pushed to the Hugging Face Hub: where `export.push_to_hub` asks for it.

The token is that of the library (HF_TOKEN, or `hf auth login`); it is in no config and no message.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from halos_jax.config import Config, ExportConfig
from halos_jax.config.tasks import TASKS
from halos_jax.errors import UserError

logger = logging.getLogger(__name__)

# Weights in a repository of which those that are not pushed are deleted there: shards of an earlier
# push, with their index, would be read in place of the new file.
_WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
_TOKEN = re.compile(r"\bhf_\w+")


class PushError(UserError, RuntimeError):
    """An export is not pushed, as it would not be what was asked for."""


def find_problems(config: Config) -> Iterator[str]:
    """Yield an error line for each field by which an export could not be pushed or named."""
    wanted, task = config.export.push_to_hub, TASKS[config.task]
    if not re.fullmatch(r"[\w.+-]*", config.export.license):
        yield (
            f"export.license: got {config.export.license!r}, allowed: the Hub's name of a licence, "
            "such as 'apache-2.0' or 'other'"
        )
    if not wanted:
        return
    if wanted.count("/") != 1 or not is_id(wanted):
        yield (
            f"export.push_to_hub: got {wanted!r}, allowed: a repository as 'OWNER/NAME'; OWNER is "
            "your account or an organisation of yours"
        )
    elif not task.exports and config.task != "pipeline":
        yield (
            f"export.push_to_hub: got {wanted!r}, allowed with task={config.task!r}: ''; it leaves "
            "no model"
        )


def is_id(name: str) -> bool:
    """Tell whether a repository of the hub could have this name."""
    try:
        try_to_load_from_cache(name, "config.json")  # it checks the name, without the network
    except HFValidationError:
        return False
    return True


def warn_of_no_token(settings: ExportConfig) -> None:
    """Warn, before a run begins, that its export could not be pushed at its end."""
    if settings.push_to_hub and not huggingface_hub.get_token():
        logger.warning(
            "export.push_to_hub=%s: there is no token of the Hugging Face Hub here; set HF_TOKEN, "
            "or log in with `hf auth login`, before the run ends",
            settings.push_to_hub,
        )


def push(folder: Path, settings: ExportConfig, *, api: HfApi | None = None) -> bool:
    """Push an export to the repository of `settings`, if it names one; return whether it is there.

    A push that fails is a warning that says how to push by hand: the export stays as it is. What
    is there already is not sent again, and no weights of an earlier push stay beside it. Call it
    on process 0 alone.
    """
    if not settings.push_to_hub:
        return False
    try:
        _push(folder, settings, api or HfApi())
    except Exception as error:  # whatever it is, the run is done and its model is complete
        logger.warning(
            "%s is complete, but was not pushed to %s (%s: %s); push it by hand with "
            "`hf upload %s %s%s`, or run the same command again",
            folder,
            settings.push_to_hub,
            type(error).__name__,
            hide_token(" ".join(str(error).split())),
            settings.push_to_hub,
            folder,
            " --private" if settings.private else "",
        )
        return False
    return True


def _push(folder: Path, settings: ExportConfig, api: HfApi) -> None:
    name = settings.push_to_hub
    logger.info("pushing %s to %s ...", folder, name)
    url = api.create_repo(name, private=settings.private, exist_ok=True)
    if settings.private and api.repo_info(name).private is False:
        raise PushError(
            "the repository is there already, and is public; make it private, name another one "
            "with --config.export.push_to_hub, or set --config.export.private=false"
        )
    api.upload_folder(
        repo_id=name,
        folder_path=folder,
        commit_message=f"Export of {folder.name}",
        delete_patterns=_WEIGHTS,
    )
    logger.info("%s is in %s", folder, url)


def hide_token(text: str) -> str:
    """Return a text without tokens of the Hub."""
    token = huggingface_hub.get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)
