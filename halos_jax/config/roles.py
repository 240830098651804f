"""What a field of the config is to a run that is carried on: one mark a field, set where it stands.

Every list of such fields is derived from the marks: what may change on a resume, how a decoder is
run, where a path stands. A field without a mark decides what is computed, and is fixed.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from halos_jax.config import schema

# "result": decides what is computed; fixed for the life of a run.
# "execution": says how it is computed: it may change, and then the last bits may differ.
# "aside": no result depends on it: logs, what is kept, how a service is reached.
# "tuning": of the optimizer: it may change, and holds from the next step on.
# "growing": how much is computed: it may grow, and the run goes on.
Role = Literal["result", "execution", "aside", "tuning", "growing"]

# Of a field that holds a path: what may stand there besides a file or folder ("path"). "model": a
# hub id too; "source": a source of `data/records/sources.py`, or several with commas between.
Place = Literal["", "path", "model", "source"]


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a field is; see `Role` and `Place`.

    Of a growing field `tasks` are those that may go on with more of it; for all others it is what
    `elsewhere` says. With `zero_is_all` 0 is the largest value.
    """

    role: Role = "result"
    place: Place = ""
    tasks: tuple[str, ...] = ()
    elsewhere: Role = "aside"
    zero_is_all: bool = False

    def role_in(self, task: str) -> Role:
        """Return the role of the field in a run of `task`."""
        return self.elsewhere if self.role == "growing" and task not in self.tasks else self.role


_Config = TypeVar("_Config")
RESULT = Mark()
_MARK = "mark"


def execution(default: Any) -> Any:
    """Declare a field that says how something is computed."""
    return _field(default, Mark("execution"))


def aside(default: Any, place: Place = "") -> Any:
    """Declare a field that no result depends on."""
    return _field(default, Mark("aside", place))


def tuning(default: Any) -> Any:
    """Declare a field of the optimizer that holds from the next step on."""
    return _field(default, Mark("tuning"))


def growing(default: int, *tasks: str, elsewhere: Role = "aside", zero_is_all: bool = False) -> Any:
    """Declare a field that says how much is computed."""
    mark = Mark("growing", tasks=tasks, elsewhere=elsewhere, zero_is_all=zero_is_all)
    return _field(default, mark)


def place(default: str, kind: Place) -> Any:
    """Declare a field that holds a path, of what decides what is computed."""
    return _field(default, Mark(place=kind))


def _field(default: Any, mark: Mark) -> Any:
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
    """List the paths of a schema's fields of a role, in their order; free sections are left out."""
    found: list[str] = []
    for name, annotation in schema.list_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            inner = list_fields(typing.cast(type, annotation), role)
            found += [f"{name}.{path}" for path in inner]
        elif schema.member_of(annotation) is None and find_mark(cls, name).role == role:
            found.append(name)
    return found


def map_places(config: _Config, change: Callable[[str, str, Place], str]) -> _Config:
    """Return a config with `change(path of the field, its text, its kind)` in every place.

    Places that are empty stay so. What a member has of its section becomes what that has.

    Args:
      config: nested dataclasses.
    """
    mapped: _Config = _map_section(config, change, "", {})
    return mapped


def list_places(config: Any) -> list[tuple[str, str, Place]]:
    """List (path of the field, its text, its kind) of every place in a config that is not empty."""
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
    """Map the places of a section; `shared` are fields of the one around it, before and after."""
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


def _pair(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    names = schema.list_hints(type(before))
    return {name: (getattr(before, name), getattr(after, name)) for name in names}
