"""Conversations as token ids, through a chat template."""

from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.chat.renderer import Renderer

__all__ = ["Renderer", "load_renderer"]
