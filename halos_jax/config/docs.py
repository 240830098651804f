"""What every field says of itself: the comment above it, or beside it, read from the source.

An empty line ends a comment: what stands before it belongs to no field.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import typing

from halos_jax.config import bounds, schema


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """A field for people: its path, what it allows and its default in words, what it says."""

    path: str
    allowed: str
    default: str
    text: str


def list_docs(cls: type, prefix: str = "") -> list[FieldDoc]:
    """Return what there is to say of each field of a schema, in order; a free section is one.

    Those of members follow as "reward.parts.NAME.weight".
    """
    found: list[FieldDoc] = []
    hints, texts = typing.get_type_hints(cls, include_extras=True), read_comments(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, annotation in schema.list_hints(cls).items():
        path, member = f"{prefix}{name}", schema.member_of(annotation)
        if dataclasses.is_dataclass(annotation):
            found += list_docs(typing.cast(type, annotation), f"{path}.")
        elif schema.is_free(annotation):
            found.append(FieldDoc(path, "a section of any names", "", texts[name]))
            found += list_docs(member, f"{path}.NAME.") if member is not None else []
        else:
            limits = bounds.describe(bounds.list_bounds(hints[name]))
            words = ", ".join(filter(None, [schema.describe(annotation), limits]))
            found.append(FieldDoc(path, words, repr(defaults[name]), texts[name]))
    return found


@functools.cache
def read_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass as one line; empty where it has none."""
    comments = {field.name: "" for field in dataclasses.fields(cls)}
    for one in reversed(cls.__mro__):  # those of a class that it extends, too
        if dataclasses.is_dataclass(one):
            comments |= _read_own(one)
    return comments


def _read_own(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    said = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    [tree] = ast.parse(source).body
    found = {}
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        last = node.end_lineno or node.lineno
        spoken = [said[number] for number in range(first, last + 1) if number in said]
        found[node.target.id] = " ".join(spoken)
    return found
