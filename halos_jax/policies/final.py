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
from halos_jax.once import once_a_run
from halos_jax.policies import serving
from halos_jax.policies.policy import Policy
from halos_jax.types import Params
from halos_jax.workdir.intact import FINAL, find_damage
from halos_jax.workdir.ledger import Ledger
from halos_jax.workdir.seals import certificate

logger = logging.getLogger(__name__)

ADAPTER = "adapter"  # in `workdir/final`


def export_final(
    params: Params,
    policy: Policy,
    workdir: Path,
    *,
    ledger: Ledger | None = None,
    frozen: Frozen | None = None,
    dtype: str | None = None,
    read_at: str = "",
) -> Path:
    """Export the params at the end of a run to `workdir/final`; see `export_policy`.

    An export that is there already, but is not as it was written, is kept under another name.
    """
    folder = workdir / FINAL
    if ledger is not None and ledger.is_writer and folder.is_dir() and find_damage(folder, ledger):
        number = next(n for n in itertools.count(1) if not _name_damaged(folder, n).exists())
        logger.warning("%s: moved to %s and made again", folder, _name_damaged(folder, number))
        folder.rename(_name_damaged(folder, number))
    return export_policy(
        params, policy, folder, frozen=frozen, dtype=dtype, read_at=read_at, ledger=ledger
    )


def choose_dtype(wanted: str, policy: Policy) -> str:
    """Return the dtype of the weights of an export for others, from `export.dtype`.

    "auto" is that of the weights that the run started from, or of the params if it drew its own.
    """
    settings, own = policy.settings, policy.decoder.params_dtype
    if wanted not in ("auto", "params"):
        return wanted
    if wanted == "params" or settings.random_init:
        return own
    chosen = export.find_dtype(hf.resolve_model(settings.path)) or own
    _report_dtype(chosen, own)
    return chosen


@once_a_run
def _report_dtype(chosen: str, own: str) -> None:
    if chosen != own:
        logger.info(
            "weights are exported in %s, as those of model.path are; the run's own are %s: "
            "--config.export.dtype=params keeps every bit of them",
            chosen,
            own,
        )


def report_other_dtype(wanted: str, folder: Path) -> None:
    """Warn that an export, which is done, has another dtype than `export.dtype` names."""
    if wanted in ("auto", "params") or not folder.is_dir():
        return
    found = export.find_dtype(folder)
    if found != wanted:
        logger.warning(
            "%s is done, and stays in %s: export.dtype=%s is for exports to come, as of "
            "--config.task=export --config.model.path=%s",
            folder,
            found,
            wanted,
            folder.parent,
        )


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

    The tokenizer's files are copied from `model.path` unchanged, unless the policy's settings name
    another tokenizer or additional tokens. `serving` adds the tokens that end an answer, and the
    chat template if it differs from that of the files. A classifier gets a padding token, so that
    transformers can score batches. With an adapter (`frozen`), the merged model is exported, and
    its subfolder `adapter/` gets the adapter itself in PEFT's format. Every process of the job
    calls this.

    Args:
      dtype: of the stored weights; None: that of the params.
      read_at: `reward.read_at` of the run that trained a classifier; "" if no run did.
      ledger: where the folder is recorded.

    Returns:
      The folder, which appears whole or not at all.

    Raises:
      ModelError: if the folder exists already, the model's architecture is not that of its source,
        or a weight is not finite.
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
            if ledger.is_writer and folder == ledger.workdir / FINAL:
                # It is no file of the export, as a verification may replace it.
                made = certificate.make_certificate(ledger.workdir, partial)
                folders.write_json(partial / certificate.FILE, made)
    return folder


def _write_tokenizer(
    folder: Path, settings: ModelConfig, renderer: Renderer, pad_id: int | None
) -> None:
    """Replace the source's tokenizer or template by the run's own, if it has one."""
    tokenizer, own = renderer.tokenizer, bool(settings.tokenizer or settings.added_tokens)
    if pad_id is not None and pad_id != tokenizer.pad_token_id:
        # Model and tokenizer must agree on the padding token. The run's own tokenizer stays as it
        # is, so a copy is changed.
        tokenizer, own = copy.deepcopy(tokenizer), True
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    if own:
        export.replace_tokenizer(folder, tokenizer)
    stored = tokenizer.chat_template
    stored = stored.get("default") if isinstance(stored, dict) else stored
    if own or settings.chat_template or renderer.template != stored:
        serving.write_template(folder, renderer.template)
