"""Every error of the package that a user can mend belongs to one family."""

import importlib
import inspect
import pkgutil

import halos_jax
from halos_jax.errors import UserError

# Caught and explained by the package itself.
INTERNAL = {"ReferenceAnswerError", "Cancelled", "JsonFault", "TemplateFault", "_Enough"}


def list_errors() -> dict[str, type]:
    found = {}
    for info in pkgutil.walk_packages(halos_jax.__path__, "halos_jax."):
        if info.name.startswith("halos_jax.bench"):
            continue
        module = importlib.import_module(info.name)
        for name, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, Exception) and value.__module__ == info.name:
                found[name] = value
    return found


def test_all_errors_are_users_errors():
    errors = list_errors()
    assert {"ConfigError", "RecordError", "ModelError", "CheckpointError"} <= errors.keys()
    others = {name for name, error in errors.items() if not issubclass(error, UserError)}
    assert others == INTERNAL


def test_exit_codes():
    codes = {name: getattr(error, "exit_code", None) for name, error in list_errors().items()}
    assert codes.pop("Interrupted") == 75
    assert {code for name, code in codes.items() if name not in INTERNAL} == {1}
