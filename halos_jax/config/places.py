"""Paths in the config: expand `~`, and refuse addresses that are no path of this machine."""

import os
import re
from collections.abc import Iterable
from typing import Any

from halos_jax.config import roles
from halos_jax.config.roles import Place

# Any scheme with "//"; known ones also with one slash, which is what pathlib makes of two.
_SCHEME = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]+)://|"
    r"(abfss?|adl|az|dbfs|file|ftp|gcs|gs|hdfs|hf|https?|memory|r2|s3[an]?|ssh|wasbs?):/"
)
_MOUNT = "mount it (gcsfuse, s3fs, ...) or copy it, and give the folder of this machine"


def expand_homes(config: object) -> Any:
    """Return a config with a leading `~` or `~user` of every path replaced by the home folder."""
    return roles.map_places(config, lambda _, text, kind: _expand(text, kind))


def find_violations(config: object) -> Iterable[str]:
    """Yield an error line for each path in a config that is no path of this machine."""
    for path, text, kind in roles.list_places(config):
        for name in split_names(text, kind):
            found = _SCHEME.match(name)
            if found:
                yield _refuse_scheme(path, name, (found[1] or found[2]).lower(), kind)
            elif re.match(r"~[^/]*/", name):  # `expand_homes` could not expand it
                user = name.partition("/")[0]
                yield (
                    f"{path}: got {name!r}, but there is no user {user[1:]!r} whose home that "
                    f"could be; allowed: a path; for a folder of that name write './{name}'"
                )


def split_names(text: str, kind: Place) -> list[str]:
    """Return the paths in a field: a "source" may be several paths, separated by commas."""
    if kind != "source" or os.path.exists(text):  # a file name may have a comma in it
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def _expand(text: str, kind: Place) -> str:
    names = split_names(text, kind)
    if not any(name.startswith("~") for name in names):
        return text
    return ",".join(os.path.expanduser(name) for name in names)


def _refuse_scheme(path: str, name: str, scheme: str, kind: Place) -> str:
    rest = re.sub(r"^[^:]*:/+", "", name)
    if scheme == "file":
        advice = f"write --config.{path}=/{rest}"
    elif scheme in ("hf", "http", "https") and kind != "path":
        shape = "'owner/name'" if kind == "model" else "'owner/name@split'"
        advice = f"what lies on the Hugging Face hub is named by its id, {shape}"
    else:
        advice = _MOUNT
    allowed = {"path": "", "model": " or the id of a model", "source": " or the id of a data set"}
    return (
        f"{path}: got {name!r}, but {scheme}:// is not supported here; allowed: a path of this "
        f"machine's file system{allowed[kind]}; {advice}"
    )
