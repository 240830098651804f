"""The end of a run: its policy or reward model, as a Hugging Face model in `workdir/final`."""

from pathlib import Path
from typing import Any

import jax

from halos_jax.config import ModelConfig
from halos_jax.data.chat import Renderer
from halos_jax.models import export, hf
from halos_jax.models.spec import DecoderConfig

FOLDER = "final"


def is_complete(workdir: Path) -> bool:
    """Tell whether the run in `workdir` has nothing left to do."""
    return (workdir / FOLDER).is_dir()


def export_final(
    params: Any, decoder: DecoderConfig, settings: ModelConfig, renderer: Renderer, workdir: Path
) -> Path:
    """Export `params` with the tokenizer and chat template that they were trained with.

    These are the files of `settings.path` as they are, unless `settings` names a tokenizer, a
    template or tokens of its own. Every process of the job calls this. Returns the folder, which
    appears whole or not at all.

    Raises:
      ModelError: where the folder is taken, or the model is another than its source's.
    """
    folder = workdir / FOLDER
    with export.replace_folder(folder) as partial:
        export.write_model(params, decoder, partial, source=hf.resolve_model(settings.path))
        own = settings.tokenizer or settings.chat_template or settings.added_tokens
        if own and jax.process_index() == 0:
            export.replace_tokenizer(partial, renderer.tokenizer)
    return folder
