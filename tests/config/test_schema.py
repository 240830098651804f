import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from halos_jax.config import Config, schema


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    label: str = ""
    flag: bool = False
    inner: Inner = Inner()
    other: Inner = Inner()
    free: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(plain):
    errors = []
    return schema.build(Outer, plain, errors), errors


def test_leaves_and_free_sections_are_found_by_path():
    assert schema.leaf_types(Outer)["inner.size"] is int
    assert "free" not in schema.leaf_types(Outer)
    assert schema.free_sections(Outer) == ["free"]


def test_flatten_joins_paths_and_lists_tuples():
    assert dict(schema.flatten({"a": {"b": (1, 2)}, "c": 3})) == {"a.b": [1, 2], "c": 3}


def test_plain_and_back_is_the_identity():
    value = Outer(label="x", inner=Inner(size=3, names=("p",)), free={"k": {"z": [1]}})
    built, errors = build(schema.to_plain(value))
    assert errors == []
    assert schema.to_plain(built) == schema.to_plain(value) | {"free": {"k": {"z": (1,)}}}


def test_every_bad_field_is_named_and_keeps_its_default():
    built, errors = build(
        {"label": 3, "flag": 1, "inner": {"size": True, "rate": "x", "kind": "c"}, "other": 7}
    )
    assert built == Outer()
    assert errors == [
        "label: got 3, allowed: a string",
        "flag: got 1, allowed: True or False",
        "inner.size: got True, allowed: an integer",
        "inner.rate: got 'x', allowed: a finite number",
        "inner.kind: got 'c', allowed: 'a', 'b'",
        "other: got 7, allowed: a section of fields",
    ]


def test_an_integer_is_a_number_but_not_the_reverse():
    assert isinstance(schema.convert(3, float), float)
    with pytest.raises(ValueError, match="an integer"):
        schema.convert(3.0, int)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            schema.convert(value, float)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("inner.sise", "did you mean 'inner.size'?"),
        ("lable", "did you mean 'label'?"),
        ("innr.size", "did you mean 'inner.size'?"),
        ("free.size", "did you mean 'other.size'?"),  # the right name in the wrong section
        ("rte", "did you mean 'other.rate'?"),
        ("inner", "is a section, not a field; set one of its fields, such as 'inner.size'"),
        ("free", "is a section, not a field; set one of its fields, such as 'free.KEY'"),
        ("qqqq", "see halos_jax/config/sections.py"),
    ],
)
def test_an_unknown_path_is_explained(path, expected):
    line = schema.explain_unknown(path, Outer)
    assert line.startswith(f"{path}: ") and expected in line


def test_a_free_section_with_a_default_is_explained_by_it():
    line = schema.explain_unknown("loss", Config)
    assert line == "loss: is a section, not a field; set one of its fields, such as 'loss.name'"


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("3", int, 3),
        ("-1", int, -1),
        ("3", float, 3.0),
        ("5e-6", float, 5e-6),
        ("true", bool, True),
        ("False", bool, False),
        ("3", str, "3"),
        ("", str, ""),
        ("a", Literal["a", "b"], "a"),
        ("('x','y')", tuple[str, ...], ("x", "y")),
        ("['x']", tuple[str, ...], ("x",)),
        ("a,b", tuple[str, ...], ("a,b",)),
        ("7", tuple[str, ...], ("7",)),
        ("", tuple[str, ...], ()),
    ],
)
def test_text_is_parsed_by_type(text, annotation, expected):
    value = schema.parse(text, annotation)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("3.5", int),
        ("x", int),
        ("true", int),
        ("nan", float),
        ("1e999", float),
        ("yes", bool),
        ("1", bool),
        ("c", Literal["a", "b"]),
        ("(1, 2)", tuple[str, ...]),
        ("1 +", int),
        ("{[]: 1}", float),
    ],
)
def test_text_of_another_type_is_refused(text, annotation):
    with pytest.raises(ValueError):
        schema.parse(text, annotation)


def test_immutable_to_the_bottom():
    value = schema.make_immutable({"a": {"b": [1, {"c": 2}]}})
    with pytest.raises(TypeError):
        value["a"]["b"] = 3
    with pytest.raises(TypeError):
        value["a"]["b"][1]["c"] = 3


def test_a_union_takes_what_one_of_its_types_takes():
    annotation = float | Literal["auto", "mean"]
    for value in (0.5, "auto", "mean"):
        assert schema.convert(value, annotation) == value
        assert schema.parse(str(value), annotation) == value
    assert schema.convert(2, annotation) == 2.0
    for value in ("median", True, None, math.inf):
        with pytest.raises(ValueError, match="is not a finite number, 'auto', 'mean'"):
            schema.convert(value, annotation)
    with pytest.raises(ValueError, match="'x' is not a finite number, 'auto', 'mean'"):
        schema.parse("x", annotation)
