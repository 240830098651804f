"""Nested frozen dataclasses as a schema: build them from plain dicts, parse text by their types.

A field of a schema is one of:
  a *section*: another such dataclass;
  a leaf: bool, int, float, str, `tuple[str, ...]`, a `Literal` of strings, or a union of these;
  a *free section*: a Mapping, whose keys are not fixed. If its values are dataclasses, they are its
    *members*; fields that a member does not set are taken from the section around it, which has
    fields of the same names.
A field is named by its path, such as "train.batch_size".
Bad values raise nothing here: errors are collected as lines that say what, got and allowed.
"""

import ast
import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from halos_jax.config.aliases import find_alias


def list_hints(cls: object) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields, without bounds; inherited fields come last."""
    return _list_hints(cls)


@functools.cache
def _list_hints(cls: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    ordered = sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)
    return {field.name: hints[field.name] for field in ordered}


def to_plain(value: object) -> Any:
    """Return nested dataclasses and mappings as plain dicts, from which `build` makes equal ones.

    Members have only those fields that differ from the section around them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = list_hints(type(value))
        plain = {name: to_plain(getattr(value, name)) for name in names}
        return drop_shared(type(value), plain)
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def drop_shared(cls: type, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain section without the fields of members, at any depth, that equal its own."""
    result = dict(plain)
    for name, annotation in list_hints(cls).items():
        value = result.get(name)
        if not isinstance(value, Mapping):
            continue
        if dataclasses.is_dataclass(annotation):
            result[name] = drop_shared(typing.cast(type, annotation), value)
        elif member_of(annotation) is not None:
            cls_of = typing.cast(type, member_of(annotation))
            result[name] = {key: _differ(cls_of, one, plain) for key, one in value.items()}
    return result


def _differ(cls: type, member: object, section: Mapping[str, Any]) -> Any:
    """Return the fields of a plain member that differ from the section's, else from the default."""
    if not isinstance(member, Mapping):
        return member
    hints, own = list_hints(cls), {}
    around = {field.name: field.default for field in dataclasses.fields(cls)} | dict(section)
    for name, value in member.items():
        if name not in around or value != around[name]:
            is_section = dataclasses.is_dataclass(hints.get(name)) and name in section
            own[name] = _differ(hints[name], value, section[name]) if is_section else value
    return own


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (path, leaf) for a nested mapping; tuples become lists, as in JSON."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map the path of every leaf of the schema `cls` to its type."""
    leaves: dict[str, Any] = {}
    for name, annotation in list_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            leaves |= leaf_types(typing.cast(type, annotation), f"{prefix}{name}.")
        elif not is_free(annotation):
            leaves[f"{prefix}{name}"] = annotation
    return leaves


def free_sections(cls: type, prefix: str = "") -> list[str]:
    """List the paths of the free sections of the schema `cls`, including those with members."""
    paths: list[str] = []
    for name, annotation in list_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            paths += free_sections(typing.cast(type, annotation), f"{prefix}{name}.")
        elif is_free(annotation):
            paths.append(f"{prefix}{name}")
    return paths


def is_free(annotation: object) -> bool:
    """Say whether a field of this type is a free section."""
    return typing.get_origin(annotation) is collections.abc.Mapping


def member_of(annotation: object) -> type | None:
    """Return the schema of the members of a field of this type; None if it has no members."""
    values = typing.get_args(annotation)[1:] if is_free(annotation) else ()
    is_member = bool(values) and dataclasses.is_dataclass(values[0])
    return typing.cast(type, values[0]) if is_member else None


def split_member(cls: type, path: str) -> tuple[str, type, str] | None:
    """Split the path of a member's field: ("reward.parts.a", its schema, "weight"); None if it is
    none."""
    name, _, rest = path.partition(".")
    annotation = list_hints(cls).get(name)
    member = member_of(annotation)
    if member is not None:
        key, _, field = rest.partition(".")
        return (f"{name}.{key}", member, field) if key else None
    if not dataclasses.is_dataclass(annotation):
        return None
    found = split_member(typing.cast(type, annotation), rest)
    return found and (f"{name}.{found[0]}", *found[1:])


def explain_unknown(path: str, cls: type) -> str:
    """Return the error line of a path that is no leaf of the schema `cls`."""
    known = list(leaf_types(cls))
    below = [name for name in known if name.startswith(f"{path}.")]
    if below or path in free_sections(cls):
        preset = [name for name, _ in flatten(to_plain(cls())) if name.startswith(f"{path}.")]
        example = [*below, *preset, f"{path}.KEY"][0]
        return f"{path}: is a section, not a field; set one of its fields, such as {example!r}"
    # An equal last name in another section is a better guess than a similar path.
    leaf = path.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(path, same_leaf, n=1, cutoff=0.0)
    alias = find_alias(path)
    if not close and alias and _has(cls, alias):
        close = [alias]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)]
    hint = (
        f"did you mean {close[0]!r}?"
        if close
        else "see halos_jax/config/sections.py for the fields"
    )
    return f"{path}: unknown field; {hint}"


def _has(cls: type, path: str) -> bool:
    free = free_sections(cls)
    return path in leaf_types(cls) or any(path.startswith(f"{section}.") for section in free)


def build(cls: type, plain: Mapping[str, Any], errors: list[str]) -> Any:
    """Build the schema `cls` from nested mappings; where a value is bad, add an error and use the
    default."""
    return _build(cls(), plain, "", cls, errors)


def build_members(
    section: object, name: str, given: Mapping[str, Any], path: str, errors: list[str]
) -> Mapping[str, Any]:
    """Build the members of the field `name` of a section from nested mappings, as `build` does."""
    cls = member_of(list_hints(type(section))[name])
    assert cls is not None, name
    shared = list_hints(type(section)).keys() & list_hints(cls).keys()
    start, members = cls(**{one: getattr(section, one) for one in shared}), {}
    for key, plain in given.items():
        if not isinstance(plain, Mapping):
            errors.append(f"{path}.{key}: got {plain!r}, allowed: a section of fields")
            continue
        lines: list[str] = []
        members[key] = _build(start, plain, "", cls, lines)
        errors += [f"{path}.{key}.{line}" for line in lines]
    return types.MappingProxyType(members)


def _build(start: Any, plain: Mapping[str, Any], prefix: str, root: type, errors: list[str]) -> Any:
    hints = list_hints(type(start))
    errors += [explain_unknown(f"{prefix}{name}", root) for name in plain if name not in hints]
    values: dict[str, Any] = {}
    members: dict[str, Mapping[str, Any]] = {}
    for name, annotation in hints.items():
        if name not in plain:
            continue
        path, value = f"{prefix}{name}", plain[name]
        section = dataclasses.is_dataclass(annotation)
        if (section or is_free(annotation)) and not isinstance(value, Mapping):
            errors.append(f"{path}: got {value!r}, allowed: a section of fields")
        elif section:
            values[name] = _build(getattr(start, name), value, f"{path}.", root, errors)
        elif member_of(annotation) is not None:
            members[name] = value
        elif is_free(annotation):
            values[name] = make_immutable(value)
        else:
            try:
                values[name] = convert(value, annotation)
            except ValueError:
                errors.append(explain_value(path, value, annotation))
    built = dataclasses.replace(start, **values)
    made = {
        name: build_members(built, name, given, f"{prefix}{name}", errors)
        for name, given in members.items()
    }
    return dataclasses.replace(built, **made)


def make_immutable(value: object) -> Any:
    """Return nested dicts and lists as read-only mappings and tuples."""
    if isinstance(value, Mapping):
        return types.MappingProxyType({key: make_immutable(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(make_immutable(item) for item in value)
    return value


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type, or raise ValueError; never guess across kinds."""
    if _is_union(annotation):
        for choice in typing.get_args(annotation):
            with contextlib.suppress(ValueError):
                return convert(value, choice)
    elif typing.get_origin(annotation) is Literal:
        if value in typing.get_args(annotation):
            return value
    elif typing.get_origin(annotation) is tuple:
        if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif annotation is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{value!r} is not {describe(annotation)}")


def parse(text: str, annotation: object) -> Any:
    """Parse command-line text as the annotated type, or raise ValueError.

    A tuple of strings is written as a Python literal, `('a','b')`; any other text is a tuple of
    that one string, and the empty text the empty tuple.
    """
    if typing.get_origin(annotation) is tuple:
        value = parse_literal(text)
        if not isinstance(value, (tuple, list)):
            value = (value if isinstance(value, str) else text,) if text else ()
        return convert(value, annotation)
    if _is_union(annotation):
        for choice in typing.get_args(annotation):
            with contextlib.suppress(ValueError):
                return parse(text, choice)
        raise ValueError(f"{text!r} is not {describe(annotation)}")
    if annotation in (bool, int, float):
        return convert(parse_literal(text), annotation)
    return convert(text, annotation)


def parse_literal(text: str) -> Any:
    """Return the Python literal that `text` spells (true/false in any case), else `text`."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def explain_value(path: str, value: object, annotation: object) -> str:
    """Return the error line for a value that does not fit its field."""
    return f"{path}: got {value!r}, allowed: {describe(annotation)}"


def describe(annotation: Any) -> str:
    """Describe in words the values that a leaf type allows."""
    if _is_union(annotation):
        return ", ".join(describe(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "a tuple of strings"
    names = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string"}
    return names[annotation]


def _is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
