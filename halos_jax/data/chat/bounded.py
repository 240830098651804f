"""Chat templates run within bounds: within a time limit, and with errors of known types.

A template is somebody else's program: it may loop for ever, or fail with any error.
"""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from halos_jax.config import ConfigError
from halos_jax.data.chat.tokenizer import Tokenizer
from halos_jax.json_text import JsonObject

# Rendering takes milliseconds; a template that takes so long is assumed to loop for ever.
SECONDS = 10.0


class TemplateFault(TemplateError):
    """A template neither returned a text nor refused the messages; see the error's cause."""


def apply_template(tokenizer: Tokenizer, messages: list[JsonObject], **options: Any) -> str:
    """Return `tokenizer.apply_chat_template(messages, tokenize=False, **options)`.

    Raises:
      TemplateError: if the template refuses the messages.
      TemplateFault: if it fails with any other error.
      ConfigError: if it does not end in time.
    """
    try:
        with limit_seconds(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        raise
    except TimeoutError as error:
        raise ConfigError(
            f"model.chat_template: got one that had not ended after {SECONDS:g} seconds, allowed: "
            "one that ends at once; mend it, or set --config.model.chat_template=FILE"
        ) from error
    except Exception as error:  # anything that a program can raise
        reason = str(error).strip().partition("\n")[0]
        raise TemplateFault(f"{type(error).__name__}: {reason}") from error
    if not isinstance(text, str):
        raise TemplateFault(f"it gave {type(text).__name__}, allowed: a text")
    return text


@contextlib.contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block if it takes longer, in any thread.

    The main thread is stopped by a signal, which costs nothing; another thread by a timer thread.
    Neither can interrupt a single step of the interpreter.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with _limit_main(seconds) if is_main else _limit_other(seconds):
        yield


@contextlib.contextmanager
def _limit_main(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limit_other(seconds: float) -> Iterator[None]:
    thread = threading.get_ident()
    lock, is_open = threading.Lock(), True

    def stop() -> None:
        with lock:
            if is_open:
                _raise_in(thread, TimeoutError)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_open = False
        timer.cancel()
        _raise_in(thread, None)  # cancel one that came at the very end


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an error in a thread at its next step; None cancels one that is not raised yet."""
    what = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
