"""Options of a chat template (`enable_thinking`, `tools`, a date), set inside of the template.

They are defaults at its top, which an argument of the same name overrides. So the template that is
exported is the one that was trained with, and who serves it needs to know nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta

from halos_jax.config import ConfigError

# What a template is given for every conversation.
_GIVEN = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")
# As `_write_default` writes it. The print of nothing keeps the line break that a template may begin
# with: one behind a statement would be taken for a part of that.
_DEFAULT = re.compile(
    r"\{%- if (\w+) is not defined or \1 is none %\}"
    r"\{%- set \1 = .*? %\}\{%- endif %\}\{\{- '' \}\}"
)
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # of transformers, not of Jinja


def set_options(
    template: str, options: Mapping[str, Any], field: str = "model.chat_template_options"
) -> str:
    """Return the template with `options` as defaults.

    Args:
      field: where they stand in the config.

    Raises:
      ConfigError: for an option that the template does not read, or whose value it cannot have; and
        where the template is not Jinja.
    """
    known = find_variables(template)
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{field}.{name}: the chat template does not read it; it reads: "
                f"{', '.join(sorted(known)) or 'no options'}"
            )
    if not options:
        return template
    # A blank before a statement at the start of a line goes, and is no start any longer.
    body = re.sub(r"\A[ \t]+(?=\{[%#])", "", template)
    written = (_write_default(name, value, field) for name, value in options.items())
    return "".join(written) + body


def list_options(template: str) -> tuple[str, ...]:
    """Return the names of the options that are set at the template's top by `set_options`."""
    names, start = [], 0
    while found := _DEFAULT.match(template, start):
        names.append(found[1])
        start = found.end()
    return tuple(names)


def find_variables(template: str) -> set[str]:
    """Return the variables that a template reads and is not always given.

    Raises:
      ConfigError: if it is not Jinja.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
        found = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"model.chat_template: is not Jinja (line {error.lineno}: {error.message}); allowed: "
            "a chat template as transformers reads it"
        ) from error
    return {name for name in found if name not in _GIVEN and not name.endswith("_token")}


def _write_default(name: str, value: object, field: str) -> str:
    return (
        f"{{%- if {name} is not defined or {name} is none %}}"
        f"{{%- set {name} = {_spell(value, f'{field}.{name}')} %}}{{%- endif %}}{{{{- '' }}}}"
    )


def _spell(value: object, field: str) -> str:
    """Return a value as a Jinja expression on one line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_spell(item, field) for item in value)}]"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = (f"{_spell(key, field)}: {_spell(item, field)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    raise ConfigError(
        f"{field}: got {value!r}, allowed: text, numbers, true, false, null, and lists and objects "
        "of these"
    )
