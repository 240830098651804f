"""Bounds of numbers: as part of the types of fields, and of settings that have a default alone."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
FractionBelowOne = Annotated[float, Interval(ge=0, lt=1)]
FractionAboveZero = Annotated[float, Interval(gt=0, le=1)]


def find_violations(section: Any, prefix: str = "") -> Iterable[str]:
    """Yield an error line for each number in nested dataclasses that is out of bounds.

    Args:
      section: a dataclass, or a mapping whose values may be dataclasses.
      prefix: the start of the paths of its fields, such as "train.".
    """
    if isinstance(section, typing.Mapping):
        members = list(section.items())
    else:
        hints = typing.get_type_hints(type(section), include_extras=True)
        members = [(name, getattr(section, name)) for name in hints]
        for name, value in members:
            bounds, words = list_bounds(hints[name]), _list_words(hints[name])
            if value not in words and not all(_allows(bound, value) for bound in bounds):
                allowed = "".join(f", or {word!r}" for word in words)
                yield f"{prefix}{name}: got {value!r}, allowed: {describe(bounds)}{allowed}"
    for name, value in members:
        if dataclasses.is_dataclass(value) or isinstance(value, typing.Mapping):
            yield from find_violations(value, f"{prefix}{name}.")


def list_bounds(annotation: Any) -> list[Ge | Gt | Le | Lt]:
    """Return the bounds in a type such as `Annotated[int, Ge(1)]`; an empty list if it has none.

    Those of a union, such as `Annotated[int, Ge(1)] | Literal["auto"]`, are those of its members.
    """
    found: list[Any] = []
    for one in getattr(annotation, "__metadata__", ()):
        found += list(one) if isinstance(one, Interval) else [one]
    own = [one for one in found if isinstance(one, (Ge, Gt, Le, Lt))]
    return own + [bound for member in _list_members(annotation) for bound in list_bounds(member)]


def _list_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; nothing for another type."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else ()


def _list_words(annotation: Any) -> tuple[Any, ...]:
    """Return the values that a union allows by name, which have no bounds."""
    literals = (one for one in _list_members(annotation) if typing.get_origin(one) is Literal)
    return tuple(word for one in literals for word in typing.get_args(one))


def describe(bounds: Iterable[Ge | Gt | Le | Lt]) -> str:
    """Describe in words which numbers the bounds allow; empty if there are no bounds."""
    at = {type(bound): getattr(bound, type(bound).__name__.lower()) for bound in bounds}
    if Ge in at and Le in at:
        return f"{at[Ge]} to {at[Le]}"
    if Gt in at and Le in at:
        return f"above {at[Gt]}, {at[Le]} at most"
    if Ge in at and Lt in at:
        return f"{at[Ge]} or more, less than {at[Lt]}"
    if Ge in at:
        return f"{at[Ge]} or more"
    return f"greater than {at[Gt]}" if Gt in at else ""


def _allows(bound: Ge | Gt | Le | Lt, value: Any) -> bool:
    if isinstance(value, str):  # of a dataclass made by hand, whose types nobody has checked
        return False
    if isinstance(bound, Ge):
        return bool(value >= bound.ge)
    if isinstance(bound, Gt):
        return bool(value > bound.gt)
    if isinstance(bound, Le):
        return bool(value <= bound.le)
    return bool(value < bound.lt)


def fits(value: Any, default: object, limits: tuple[float, float] = (-math.inf, math.inf)) -> bool:
    """Tell whether a setting may have a value: a switch's or a finite number's, as its default is.

    Args:
      limits: of a number: the least, and what it must be less than.
    """
    if isinstance(default, bool):
        return isinstance(value, bool)
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return bool(limits[0] <= value < limits[1])


def describe_setting(default: object, limits: tuple[float, float]) -> str:
    """Describe in words what `fits` allows."""
    if isinstance(default, bool):
        return "True or False"
    if limits == (-math.inf, math.inf):
        return "a finite number"
    upper = ""
    if math.isfinite(limits[1]):
        most = math.nextafter(limits[1], -math.inf)  # a limit just above a round number allows it
        upper = f", {most:g} at most" if most == round(most, 6) else f", less than {limits[1]:g}"
    return f"{limits[0]:g} or more{upper}"
