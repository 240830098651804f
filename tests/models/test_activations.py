"""Activation functions: every name of transformers is its very function, or refused."""

import jax
import numpy as np
import pytest

from halos_jax.models.activations import ACTIVATIONS, NAMES
from halos_jax.models.hf.fields import read_architecture

SIZES = {
    "vocab_size": 11,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}
# These have weights of their own, which no key table knows.
WEIGHTED = {"prelu", "xielu"}


def test_every_name_is_that_function_or_refused():
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    assert set(ACT2FN) == set(NAMES) | WEIGHTED
    # Away from the corners, where a derivative is a matter of taste.
    x = np.concatenate([np.linspace(-15, 15, 614), [-30.0, 30.0]]).astype(np.float32)
    for name in NAMES:
        theirs = torch.tensor(x, requires_grad=True)
        expected = ACT2FN[name](theirs)
        expected.sum().backward()
        ours = ACTIVATIONS[NAMES[name]]
        np.testing.assert_allclose(ours(x), expected.detach(), rtol=2e-5, atol=2e-6, err_msg=name)
        slopes = jax.vmap(jax.grad(ours))(x)
        # XLA's older emitters (tests/compilation.py) have a tanh of 9e-6 at its flat ends.
        np.testing.assert_allclose(slopes, theirs.grad, rtol=2e-5, atol=1e-5, err_msg=name)


def test_names_of_one_function_are_one_and_none_is_left_over():
    assert set(NAMES.values()) == set(ACTIVATIONS)
    for name, one in {"gelu_fast": "gelu_tanh", "swish": "silu", "gelu_python": "gelu"}.items():
        errors = []
        assert read_architecture(SIZES | {"hidden_act": name}, errors)["activation"] == one
        assert not errors


@pytest.mark.parametrize("name", [*sorted(WEIGHTED), "geglu", None, 3, ["silu"], {"a": 1}, True])
def test_what_has_weights_or_is_no_name_is_refused(name):
    errors = []
    read_architecture(SIZES | {"hidden_act": name}, errors)
    (line,) = errors
    assert line.startswith(f"hidden_act: got {name!r}, allowed: 'silu', 'swish', 'gelu',")
