"""Every field says what it is, and nobody renames one by accident."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Ge

from halos_jax.config import Config, schema
from halos_jax.config.docs import FieldDoc, list_docs, read_comments
from halos_jax.config.rewards import PartConfig
from halos_jax.config.roles import execution

NAMES = Path(__file__).with_name("command_line_names.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    size: Annotated[int, Ge(1)] = execution(3)  # of the table


@dataclasses.dataclass(frozen=True)
class Own(Shared):
    """A docstring is no field's."""

    # Above it,
    # in two lines
    first: str = "#"
    second: bool = False  # beside it

    # Of what follows, all:

    third: tuple[str, ...] = (
        "a",  # inside of it
    )
    fourth: float = 0.0


def test_comments_are_read_from_the_source():
    assert read_comments(Own) == {
        "size": "of the table",
        "first": "Above it, in two lines",
        "second": "beside it",
        "third": "inside of it",
        "fourth": "",
    }
    docs = list_docs(Own, "x.")
    assert docs[0] == FieldDoc("x.first", "a string", "'#'", "Above it, in two lines")
    assert docs[-1] == FieldDoc("x.size", "an integer, 1 or more", "3", "of the table")


@pytest.mark.parametrize("cls", [Config, PartConfig])
def test_every_field_says_what_it_is(cls):
    docs = [one for one in list_docs(cls) if ".NAME." not in one.path]
    assert [one.path for one in docs if len(one.text) < 4] == []
    paths = {*schema.leaf_types(cls), *schema.free_sections(cls)}
    assert {one.path for one in docs} == paths and len(docs) == len(paths)


def test_a_field_is_never_renamed():
    """The names are the users': what is new is added to the file, and nothing is taken out."""
    assert sorted(one.path for one in list_docs(Config)) == NAMES.read_text().splitlines()
