"""Activation functions by the names that `config.json` has for them.

Names of one function, written down in several ways, are one: what differs is the rounding.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

_UNIQUE = (
    *("gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "mish"),
    *("hardswish", "laplace", "linear", "sigmoid", "sqrtsoftplus", "tanh"),
)
# Name in config.json -> name here, of all that `transformers` has and that hold no weights.
NAMES = {
    "silu": "silu",
    "swish": "silu",
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **{name: name for name in _UNIQUE},
}


def _laplace(x: jax.Array) -> jax.Array:
    """Apply the Laplace function (Ma et al. 2022, MEGA): a normal distribution's, near relu^2."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "linear": lambda x: x,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
}
