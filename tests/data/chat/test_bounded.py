"""Templates that do not end or fail in any way: one kind of error, at once."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError

from halos_jax.config import ConfigError
from halos_jax.data.chat import bounded
from halos_jax.data.chat.bounded import TemplateFault, apply_template, limit_seconds
from tests.data.chat.test_loading import make_tokenizer

USER = [{"role": "user", "content": "x"}]
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"


def test_a_template_that_ends_gives_its_text_and_gets_its_options():
    tokenizer = make_tokenizer("{{ messages[0].content }}{{ add_generation_prompt }}{{ z }}")
    assert apply_template(tokenizer, USER, add_generation_prompt=True, z=3) == "xTrue3"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages | sum }}", "TypeError"),
        ("{{ {}['a'].b.c }}", "has no attribute"),
        (DOUBLING, "RecursionError"),
        ("{{ 'x' * 10**17 }}", "Error"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no') }}", "no"),
    ],
)
def test_every_way_to_fail_is_a_template_error(template, message):
    with pytest.raises(TemplateError) as caught:
        apply_template(make_tokenizer(template), USER)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    start, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConfigError, match=r"had not ended after 0.2 seconds, allowed: one that"):
        apply_template(make_tokenizer(ENDLESS), USER)
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_is_no_text_is_refused():
    tokenizer = SimpleNamespace(apply_chat_template=lambda *given, **options: [1])
    with pytest.raises(TemplateFault, match="it gave list, allowed: a text"):
        apply_template(tokenizer, USER)


def test_another_thread_runs_without_a_limit():
    ended = []

    def work():
        with limit_seconds(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
