"""What a field of the config is to a run that is carried on: one mark a field, set where it stands.

Every list of such fields is derived from the marks: what may change on a resume, how a decoder is
run, where a path stands. A field without a mark decides what is computed, and is fixed.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

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


RESULT = Mark()
_MARK, _MEMBERS = "mark", "members"


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


def members(of: type) -> Any:
    """Declare a free section, name -> some fields of the schema `of`, whose marks hold there."""
    return dataclasses.field(default_factory=dict, metadata={_MEMBERS: of})


def _field(default: Any, mark: Mark) -> Any:
    return dataclasses.field(default=default, metadata={_MARK: mark})


def find_mark(schema: type, path: str) -> Mark:
    """Return the mark of the field at `path` ("train.epochs") of a schema; RESULT if unknown."""
    name, _, rest = path.partition(".")
    field = next((one for one in dataclasses.fields(schema) if one.name == name), None)
    if field is None:
        return RESULT
    annotation = typing.get_type_hints(schema)[name]
    if dataclasses.is_dataclass(annotation):
        return find_mark(annotation, rest)
    if _MEMBERS in field.metadata:
        return find_mark(field.metadata[_MEMBERS], rest.partition(".")[2])
    return field.metadata.get(_MARK, RESULT)


def list_fields(schema: type, role: Role) -> list[str]:
    """List the paths of a schema's fields of a role, in their order; free sections are left out."""
    found = []
    for field in dataclasses.fields(schema):
        annotation = typing.get_type_hints(schema)[field.name]
        if dataclasses.is_dataclass(annotation):
            found += [f"{field.name}.{path}" for path in list_fields(annotation, role)]
        elif find_mark(schema, field.name).role == role and _MEMBERS not in field.metadata:
            found.append(field.name)
    return found


def map_places(config: Any, change: Callable[[str, str, Place], str]) -> Any:
    """Return a config with `change(path of the field, its text, its kind)` in every place.

    Args:
      config: nested dataclasses. Places that are empty stay so.
    """
    return dataclasses.replace(config, **_map(type(config), _as_mapping(config), change, ""))


def list_places(config: Any) -> list[tuple[str, str, Place]]:
    """List (path of the field, its text, its kind) of every place in a config that is not empty."""
    found: list[tuple[str, str, Place]] = []

    def note(path: str, text: str, kind: Place) -> str:
        found.append((path, text, kind))
        return text

    map_places(config, note)
    return found


def _map(schema: type, values: Mapping[str, Any], change: Callable, prefix: str) -> dict[str, Any]:
    mapped = {}
    for field in dataclasses.fields(schema):
        if field.name not in values:
            continue
        path, value = f"{prefix}{field.name}", values[field.name]
        annotation = typing.get_type_hints(schema)[field.name]
        mark = field.metadata.get(_MARK, RESULT)
        if dataclasses.is_dataclass(annotation):
            mapped[field.name] = _map_section(annotation, value, change, f"{path}.")
        elif _MEMBERS in field.metadata:
            of = field.metadata[_MEMBERS]
            mapped[field.name] = types.MappingProxyType(
                {
                    name: _map_section(of, one, change, f"{path}.{name}.")
                    for name, one in value.items()
                }
            )
        elif mark.place and isinstance(value, str) and value:
            mapped[field.name] = change(path, value, mark.place)
    return mapped


def _map_section(schema: type, value: Any, change: Callable, prefix: str) -> Any:
    mapped = _map(schema, _as_mapping(value), change, prefix)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **mapped)
    return types.MappingProxyType({**value, **mapped}) if isinstance(value, Mapping) else value


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value if isinstance(value, Mapping) else {}
