"""The role of each field of the config when a run is resumed: one mark at the field's declaration.

Every list of fields is derived from these marks: which may change on a resume, which say how a
decoder is run, which hold paths. A field without a mark decides what is computed, and is fixed.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from halos_jax.config import schema

# "result": decides what is computed; fixed for the life of a run.
# "execution": decides how it is computed; may change, and results may then differ in the last bits.
# "aside": no result depends on it (logs, what is kept, how to reach a service); may change.
# "tuning": belongs to the optimizer or the guard; may change, with effect from here on.
# "growing": decides how much is computed; may be raised, and the run goes on.
Role = Literal["result", "execution", "aside", "tuning", "growing"]

# What a field that holds a path may name. "path": a file or folder; "model": also a hub id;
# "source": a source of `data/records/sources.py`, or several separated by commas. "": no path.
Place = Literal["", "path", "model", "source"]


@dataclasses.dataclass(frozen=True)
class Mark:
    """The role of a field and the kind of path it holds; see `Role` and `Place`.

    If `tasks` are named, the field has its role in these alone, and `elsewhere` in all others. With
    `zero_is_all`, 0 is the largest value of a growing field.
    """

    role: Role = "result"
    place: Place = ""
    tasks: tuple[str, ...] = ()
    elsewhere: Role = "aside"
    zero_is_all: bool = False

    def role_in(self, task: str) -> Role:
        """Return the role of the field in a run of `task`."""
        return self.elsewhere if self.tasks and task not in self.tasks else self.role


_Config = TypeVar("_Config")
RESULT = Mark()
_MARK = "mark"


def execution(default: object) -> Any:
    """Declare a field with the role "execution"."""
    return _field(default, Mark("execution"))


def aside(default: object, place: Place = "") -> Any:
    """Declare a field with the role "aside"."""
    return _field(default, Mark("aside", place))


def tuning(default: object) -> Any:
    """Declare a field with the role "tuning"."""
    return _field(default, Mark("tuning"))


def growing(default: int, *tasks: str, elsewhere: Role = "aside", zero_is_all: bool = False) -> Any:
    """Declare a field with the role "growing"."""
    mark = Mark("growing", tasks=tasks, elsewhere=elsewhere, zero_is_all=zero_is_all)
    return _field(default, mark)


def result_in(default: object, *tasks: str) -> Any:
    """Declare a field with the role "result" in some tasks, and "tuning" in all others."""
    return _field(default, Mark("result", tasks=tasks, elsewhere="tuning"))


def place(default: str, kind: Place) -> Any:
    """Declare a field with the role "result" that holds a path."""
    return _field(default, Mark(place=kind))


def _field(default: object, mark: Mark) -> Any:
    return dataclasses.field(default=default, metadata={_MARK: mark})


def find_mark(cls: type, path: str) -> Mark:
    """Return the mark of the field at `path` ("train.epochs") of a schema; RESULT if unknown."""
    name, _, rest = path.partition(".")
    annotation = schema.list_hints(cls).get(name)
    if annotation is None:
        return RESULT
    member = schema.member_of(annotation)
    if member is not None:
        return find_mark(member, rest.partition(".")[2])
    if dataclasses.is_dataclass(annotation):
        return find_mark(typing.cast(type, annotation), rest)
    return _find_own(cls, name)


def _find_own(cls: type, name: str) -> Mark:
    marks = {field.name: field.metadata.get(_MARK, RESULT) for field in dataclasses.fields(cls)}
    return typing.cast(Mark, marks[name])


def list_fields(cls: type, role: Role) -> list[str]:
    """List the paths of the fields with a role, in their order and without free sections."""
    found: list[str] = []
    for name, annotation in schema.list_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            inner = list_fields(typing.cast(type, annotation), role)
            found += [f"{name}.{path}" for path in inner]
        elif schema.member_of(annotation) is None and find_mark(cls, name).role == role:
            found.append(name)
    return found


def map_places(config: _Config, change: Callable[[str, str, Place], str]) -> _Config:
    """Return a config with every path replaced by `change(path of the field, its text, its kind)`.

    Empty paths stay empty. Where a member has its section's value, it gets the section's new value.

    Args:
      config: nested dataclasses.
    """
    mapped: _Config = _map_section(config, change, "", {})
    return mapped


def list_places(config: object) -> list[tuple[str, str, Place]]:
    """List (path of the field, its text, its kind) for every path in a config that is not empty."""
    found: list[tuple[str, str, Place]] = []

    def note(path: str, text: str, kind: Place) -> str:
        found.append((path, text, kind))
        return text

    map_places(config, note)
    return found


def _map_section(
    section: Any,
    change: Callable[[str, str, Place], str],
    prefix: str,
    shared: Mapping[str, tuple[Any, Any]],
) -> Any:
    """Map the paths in a section.

    `shared` maps the fields that it shares with the section around it to the values that they have
    there, before and after mapping.
    """
    mapped: dict[str, Any] = {}
    hints = schema.list_hints(type(section))
    for name in hints:
        path, value = f"{prefix}{name}", getattr(section, name)
        before, after = shared.get(name, (None, None))
        place = _find_own(type(section), name).place
        if name in shared and before == value:
            mapped[name] = after
        elif dataclasses.is_dataclass(value):
            inner = _pair(before, after) if name in shared else {}
            mapped[name] = _map_section(value, change, f"{path}.", inner)
        elif place and isinstance(value, str) and value:
            mapped[name] = change(path, value, place)
    done = dataclasses.replace(section, **mapped)
    for name, annotation in hints.items():
        if schema.member_of(annotation) is not None:
            pairs, members = _pair(section, done), getattr(section, name)
            made = {
                key: _map_section(one, change, f"{prefix}{name}.{key}.", pairs)
                for key, one in members.items()
            }
            done = dataclasses.replace(done, **{name: types.MappingProxyType(made)})
    return done


def _pair(before: object, after: object) -> dict[str, tuple[Any, Any]]:
    names = schema.list_hints(type(before))
    return {name: (getattr(before, name), getattr(after, name)) for name in names}
