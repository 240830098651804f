"""What a run starts from: the architecture of its policy, and the renderer of its prompts."""

from halos_jax.config import ModelConfig
from halos_jax.data.chat import Renderer, load_policy_renderer
from halos_jax.models import hf, vocab
from halos_jax.models.spec import DecoderConfig


def load_policy(settings: ModelConfig) -> tuple[DecoderConfig, Renderer]:
    """Load the policy's decoder config and renderer, with a row for each of its tokens.

    The params of the former, `hf.load_or_init_params` of it, have the rows of new tokens filled.

    Raises:
      ConfigError: where there is no usable tokenizer.
      ModelError: where there is no usable model, or it and the tokenizer do not fit.
    """
    decoder = hf.load_decoder_config(settings.path, settings)
    if decoder.gating is not None:
        raise hf.ModelError(
            f"model.path: got {settings.path!r}, a reward model with a gating network; allowed: a "
            "language model, or a classifier with a linear head; this one can be reward.path"
        )
    renderer = load_policy_renderer(settings)
    vocabulary = renderer.tokenizer.get_vocab()
    return vocab.fit_vocab(decoder, vocabulary, renderer.new_tokens, settings), renderer
