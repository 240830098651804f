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


def run_in_thread(work):
    """Run a function in another thread; return what it returned or raised."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    return found[0]


def test_another_thread_is_stopped_too_and_goes_on_afterwards(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    endless, short = make_tokenizer(ENDLESS), make_tokenizer("{{ messages[0].content }}")

    def work():
        with pytest.raises(ConfigError, match=r"had not ended after 0\.2 seconds"):
            apply_template(endless, USER)
        return [apply_template(short, USER) for _ in range(3)]

    start = time.monotonic()
    assert run_in_thread(work) == ["x"] * 3
    assert time.monotonic() - start < 10
    for thread in threading.enumerate():  # nobody waits for what has ended
        if isinstance(thread, threading.Timer):
            thread.join(timeout=0.1)
            assert not thread.is_alive()


def test_time_that_is_up_at_the_very_end_does_no_harm_later():
    def work():
        late = 0
        for _ in range(200):
            try:
                with limit_seconds(0.0005):
                    time.sleep(0.0005)
            except TimeoutError:
                late += 1
            for _ in range(50):  # an error that came too late would be raised here
                pass
        return late

    assert 0 <= run_in_thread(work) <= 200


def test_each_thread_has_a_limit_of_its_own():
    def work():
        with limit_seconds(60):
            time.sleep(0.05)
        return "ended"

    assert run_in_thread(work) == "ended"
    with limit_seconds(60):
        assert run_in_thread(work) == "ended"
