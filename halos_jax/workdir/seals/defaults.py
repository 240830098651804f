"""The defaults that a version has for the config's fields, so that a later one knows them.

A seal leaves out what has its default. What that was stands in executions.jsonl, under a name that
is in the seal: a later version may have other defaults, and more fields.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halos_jax import losses
from halos_jax.config import Config, roles, schema
from halos_jax.workdir.changes import BEFORE_AUTO


def list_defaults(config: Config) -> dict[str, Any]:
    """Return path -> default of the fields that results of the config's task depend on.

    Hyperparameters of its loss are among them, paths are not. All values are JSON.
    """
    found = dict(schema.flatten(schema.to_plain(Config())))
    filled = losses.fill_defaults({"name": config.loss.get("name")})
    found |= {f"loss.{name}": value for name, value in filled.items() if name != "name"}
    found = {path: value for path, value in found.items() if is_of_results(path, config)}
    plain: dict[str, Any] = json.loads(json.dumps({**found, **BEFORE_AUTO}))
    return plain


def is_of_results(path: str, config: Config) -> bool:
    """Tell whether results of the config's task depend on a field by its value."""
    mark = roles.find_mark(Config, path)
    return mark.role_in(config.task) in ("result", "tuning") and not mark.place


def name_defaults(defaults: Mapping[str, Any]) -> str:
    """Return a name for defaults that depends on their content alone; "" for none."""
    text = json.dumps(dict(defaults), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if defaults else ""
