"""The end of a run: its policy or reward model, as a Hugging Face model in `workdir/final`."""

import copy
import itertools
import logging
from pathlib import Path

import jax

from halos_jax.config import ModelConfig
from halos_jax.data.chat.renderer import Renderer
from halos_jax.models.files import export, folders, hf, peft
from halos_jax.models.lora import Frozen, merge_adapter
from halos_jax.policies import serving
from halos_jax.policies.policy import Policy
from halos_jax.types import Params
from halos_jax.workdir.intact import FINAL, find_damage
from halos_jax.workdir.ledger import Ledger

logger = logging.getLogger(__name__)

ADAPTER = "adapter"  # inside of `workdir/final`


def export_final(
    params: Params,
    policy: Policy,
    workdir: Path,
    *,
    ledger: Ledger | None = None,
    frozen: Frozen | None = None,
    read_at: str = "",
) -> Path:
    """Export the params at the end of a run to `workdir/final`; as `export_policy`.

    An export that stands there and is not as it was written is kept under another name.
    """
    folder = workdir / FINAL
    if ledger is not None and ledger.is_writer and folder.is_dir() and find_damage(folder, ledger):
        number = next(n for n in itertools.count(1) if not _name_damaged(folder, n).exists())
        logger.warning("%s: moved to %s and made again", folder, _name_damaged(folder, number))
        folder.rename(_name_damaged(folder, number))
    return export_policy(params, policy, folder, frozen=frozen, read_at=read_at, ledger=ledger)


def _name_damaged(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.damaged-{number}")


def export_policy(
    params: Params,
    policy: Policy,
    folder: Path,
    *,
    frozen: Frozen | None = None,
    dtype: str | None = None,
    read_at: str = "",
    ledger: Ledger | None = None,
) -> Path:
    """Export `params` with the tokenizer and chat template that they were trained with.

    The former are the files of `model.path` as they are, unless the policy's settings name a
    tokenizer or tokens of its own; what ends an answer, and the template where that is not the
    files' own, are written beside (`serving`). A classifier gets a padding token, so that
    transformers can score batches. Of an adapter of `frozen` the merged model is exported, and the
    adapter itself, in PEFT's format, in a folder `adapter/` in it. Every process of the job calls
    this. Returns the
    folder, which appears whole or not at all.

    Args:
      dtype: of the stored weights; None: that of the params.
      read_at: `reward.read_at` of the run that has trained a classifier; "": none has.
      ledger: where the folder is recorded.

    Raises:
      ModelError: where the folder is taken, the model is another than its source's, or a weight is
        not finite.
    """
    decoder, settings, renderer = policy.decoder, policy.settings, policy.renderer
    with folders.replace_folder(folder) as partial:
        source = hf.resolve_model(settings.path)
        pad_id = renderer.pad_id if decoder.num_labels else None
        merged = merge_adapter(params, frozen)
        export.write_model(merged, decoder, partial, source=source, dtype=dtype, pad_id=pad_id)
        if frozen is not None:
            peft.write_adapter(params, frozen, decoder, partial / ADAPTER, base=settings.path)
        if jax.process_index() == 0:
            _write_tokenizer(partial, settings, renderer, pad_id)
            if not decoder.num_labels:
                serving.write_stops(partial, renderer)
            elif read_at:
                serving.write_place(partial, renderer, read_at)
            if frozen is not None:
                serving.copy_to_adapter(partial, partial / ADAPTER)
        if ledger is not None:
            ledger.note_tree(folder, partial)
    return folder


def _write_tokenizer(
    folder: Path, settings: ModelConfig, renderer: Renderer, pad_id: int | None
) -> None:
    """Write the run's own tokenizer or template in place of the source's, where it had one."""
    tokenizer, own = renderer.tokenizer, bool(settings.tokenizer or settings.added_tokens)
    if pad_id is not None and pad_id != tokenizer.pad_token_id:
        # Model and tokenizer must agree on it; the run's own tokenizer stays as it is.
        tokenizer, own = copy.deepcopy(tokenizer), True
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    if own:
        export.replace_tokenizer(folder, tokenizer)
    stored = tokenizer.chat_template
    stored = stored.get("default") if isinstance(stored, dict) else stored
    if own or settings.chat_template or renderer.template != stored:
        serving.write_template(folder, renderer.template)
