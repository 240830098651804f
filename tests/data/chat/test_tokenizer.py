"""A tokenizer of `transformers` has all that the package takes for granted."""

import inspect

from halos_jax.data.chat.tokenizer import AddedToken, Tokenizer
from halos_jax.data.toy import make_tokenizer


def list_members(protocol):
    named = {name for name in vars(protocol) if not name.startswith("_")}
    return named | protocol.__annotations__.keys() | {"__call__"}


def test_a_tokenizer_has_every_member_with_the_arguments_that_are_named():
    tokenizer = make_tokenizer("abc")
    members = list_members(Tokenizer)
    assert {"name_or_path", "bos_token_id", "decode", "__call__"} <= members
    assert [name for name in sorted(members) if not hasattr(tokenizer, name)] == []
    for name in ("get_vocab", "convert_tokens_to_ids", "add_tokens", "decode", "save_pretrained"):
        wanted = inspect.signature(getattr(Tokenizer, name)).parameters
        there = inspect.signature(getattr(type(tokenizer), name)).parameters
        assert {*wanted} - {"options"} <= {*there}, name


def test_an_added_token_has_every_member():
    for token in make_tokenizer("abc").added_tokens_decoder.values():
        missing = list_members(AddedToken) - {"__call__"} - {*dir(token)}
        assert not missing
