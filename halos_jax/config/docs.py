"""The documentation of fields: the comment above or beside each one, read from the source.

An empty line ends a comment: what comes before it documents no field.
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
    """The documentation of a field: its path, allowed values and default in words, its comment."""

    path: str
    allowed: str
    default: str
    text: str


def list_docs(cls: type, prefix: str = "") -> list[FieldDoc]:
    """Return the documentation of each field of a schema, in order.

    A free section counts as one field; the fields of its members, if it has any, follow it with
    paths such as "reward.parts.NAME.weight".
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
    """Return the comment of each field of a dataclass as one line; empty if it has none."""
    comments = {field.name: "" for field in dataclasses.fields(cls)}
    for one in reversed(cls.__mro__):  # inherited fields, too
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
