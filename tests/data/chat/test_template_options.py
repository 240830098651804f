"""Options stand at the template's top: whoever renders it gets them, unless told otherwise."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from halos_jax.config import ConfigError
from halos_jax.data.chat.template_options import find_variables, list_options, set_options

HYBRID = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
DATED = "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}" + (
    "{{ date_string }}|{{ note }}|" + HYBRID
)
CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, 2.5, None]}}}]


def render(template, **options):
    """Render as transformers does, which always passes tools and documents."""
    arguments = {"chat_template": template, "add_generation_prompt": True}
    return render_jinja_template(conversations=[CHAT], **arguments, **options)[0][0]


@pytest.mark.parametrize("blanks", ["", "\n", "\n\n  ", "  ", "text\n "])
@pytest.mark.parametrize(
    "options",
    [
        {"enable_thinking": False},
        {"enable_thinking": True, "date_string": "1 Jan"},
        {"tools": TOOLS, "note": "é \"quoted\" 'x' \\ \n {% endif %} {{ x }} 🙂"},
        {"note": {"a": [True, False, None, -1, 1e-05, "b"], "c d": {}}},
        {"note": 7},
    ],
)
def test_a_default_is_what_passing_it_would_be(options, blanks):
    template = blanks + DATED
    made = set_options(template, options)
    assert list_options(made) == tuple(options)
    assert render(made) == render(template, **options)
    assert render(made) != render(template)
    # An argument overrides it, and what the template itself says is left alone.
    other = {"enable_thinking": True, "date_string": "2 Feb", "note": "n", "tools": TOOLS[:0]}
    assert render(made, **other) == render(template, **other)
    again = set_options(made, {"note": "second"})
    assert render(again) == render(template, **(options | {"note": "second"}))


def test_no_option_changes_nothing():
    assert set_options(HYBRID, {}) is HYBRID
    assert list_options(HYBRID) == ()
    assert list_options("{%- if x is not defined or x is none %}{%- endif %}") == ()


def test_what_a_template_reads():
    assert find_variables(HYBRID) == {"tools", "enable_thinking"}
    assert find_variables(DATED) == {"tools", "enable_thinking", "date_string", "note"}
    marked = "{{ bos_token }}{% for m in messages %}{%- generation -%}{{ m.content }}"
    marked += "{% endgeneration %}{% if m.x %}{% break %}{% endif %}{% endfor %}{{ strftime_now }}"
    assert find_variables(marked) == set()


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (HYBRID, {"enable_thinkin": False}, r"x\.enable_thinkin: .*reads: enable_thinking, tools"),
        ("{{ messages }}", {"tools": []}, r"x\.tools: .* does not read it; it reads: no options"),
        (HYBRID, {"messages": []}, r"x\.messages: the chat template does not read it"),
        (HYBRID, {"tools": [float("inf")]}, r"x\.tools: got inf, allowed: text, numbers"),
        (HYBRID, {"tools": {1: 2}}, r"x\.tools: got {1: 2}, allowed"),
        ("{% if %}", {}, r"chat_template: is not Jinja \(line 1: "),
        ("a\n{% endfor %}", {}, r"chat_template: is not Jinja \(line 2: "),
    ],
)
def test_bad_options_are_one_error(template, options, message):
    with pytest.raises(ConfigError, match=message):
        set_options(template, options, "x")
