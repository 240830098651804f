"""A client of OpenAI's chat completions that keeps a pace, retries, and never shows its key."""

import dataclasses
import datetime
import email.utils
import json
import logging
import os
import random
import threading
import time
from collections import Counter

import httpx2

from halos_jax.config import ConfigError
from halos_jax.config.rewards import JudgeConfig
from halos_jax.data.records.fields import shorten
from halos_jax.json_text import JsonObject
from halos_jax.once import say_once
from halos_jax.rewards.labels import RewardError

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds: bounds of the random pause before a retry
_LONGEST_HOLD = 900.0  # seconds: the longest wait that a server may ask for
_SHORTEST_KEY = 8  # a shorter one is a placeholder ("EMPTY", "1") and may stand in honest text
_PASSING = (408, 409, 425, 429)  # the 4xx statuses that may pass with another try


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The judge's text, and why it ended: "stop", or "length" if it was cut."""

    text: str
    finish_reason: str


class UnreachableError(RewardError):
    """There is no server at the judge's address."""


class Cancelled(Exception):
    """The client was stopped while a request waited."""


def load_key(variable: str) -> str:
    """Return the key in an environment variable; "" if no variable is named.

    Raises:
      ConfigError: if the variable is not set or holds no key. The message never shows its value.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        found = "text with spaces or other characters that no key has" if key else "nothing"
        raise ConfigError(
            f"reward.judge.key_variable: the environment variable {variable} holds {found}; set it "
            "to the API's key, or give --config.reward.judge.key_variable='' to send none"
        )
    return key


def check_url(url: str) -> None:
    """Raise ConfigError if no request can be sent to `url`."""
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"reward.judge.url: got {url!r}, which is no address: {error}") from error


class Pace:
    """Spreads requests evenly over time; if the server asks one thread to wait, all do."""

    def __init__(self, per_minute: int, stop: threading.Event):
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = self._held = 0.0  # times of time.monotonic()
        self._lock = threading.Lock()
        self._stop = stop

    def wait(self) -> None:
        """Wait until the next request may be sent; raise Cancelled if the client is stopped."""
        turn = None
        while True:
            with self._lock:
                # A request that a hold overtakes queues again, so that no burst follows the hold.
                if turn is None or turn < self._held:
                    turn = max(self._next, self._held, time.monotonic())
                    self._next = turn + self._interval
            rest = turn - time.monotonic()
            self.sleep(max(rest, 0.0))
            if rest <= 0:
                return

    def hold(self, seconds: float) -> None:
        """Send no request for some time."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait; raise Cancelled as soon as the client is stopped."""
        if self._stop.wait(seconds):
            raise Cancelled


class JudgeClient:
    """Asks one model of one server, for many threads at a time."""

    def __init__(self, settings: JudgeConfig, key: str):
        self._settings, self._key = settings, key
        self._url = f"{settings.url.rstrip('/')}/chat/completions"
        self._stop = threading.Event()
        self._pace = Pace(settings.requests_per_minute, self._stop)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=settings.timeout,
            limits=httpx2.Limits(max_connections=settings.concurrency),
        )
        self.counts: Counter[str] = Counter()  # requests, and failures by their reason

    def stop(self) -> None:
        """Send no more requests: threads that wait to send one get Cancelled."""
        self._stop.set()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def reach(self) -> None:
        """Raise UnreachableError if there is no server; any answer shows that there is one.

        One request that costs nothing, without retries: only a server that has answered in this run
        before is worth waiting for.
        """
        try:
            self._http.get(f"{self._settings.url.rstrip('/')}/models")
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx2.RequestError as error:
            logger.info("judge: %s at the first contact", type(error).__name__)

    def probe(self, body: JsonObject) -> None:
        """Send one request to see whether the server accepts it.

        A failure that may pass (429, 5xx, a time-out) is only logged.

        Raises:
          UnreachableError: if there is no server.
          RewardError: if it refuses the request.
        """
        try:
            response = self._http.post(self._url, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx2.RequestError as error:
            say_once(logger, "judge: the first request failed for now: %s", type(error).__name__)
            return
        found = self._read(response)
        if not isinstance(found, Answer):
            say_once(logger, "judge: the first request failed for now: %s", found[0])

    def _unreachable(self, error: Exception) -> UnreachableError:
        address = httpx2.URL(self._url)
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        return UnreachableError(
            f"reward.judge.url: nothing listens at {address.host}:{port} "
            f"({str(error) or type(error).__name__}); start the server, or set "
            "--config.reward.judge.url=URL"
        )

    def ask(self, body: JsonObject) -> Answer | None:
        """Send a request until it is answered; return None if it still is not after all retries.

        A lost connection, a time-out, an error of the server (5xx), 408, 409, 425, 429 and a reply
        that is no chat completion are retried, after a pause drawn from [0, 2^n] seconds (at most
        60) and the time in the server's Retry-After.

        Raises:
          RewardError: if the server refuses the request, so that retries are useless.
          Cancelled: if the client was stopped.
        """
        reason = ""
        for attempt in range(self._settings.retries + 1):
            self._pace.wait()
            found = self._send(body)
            if isinstance(found, Answer):
                return found
            reason, hold = found
            self.counts[reason] += 1
            if attempt == self._settings.retries:
                break
            pause = random.uniform(0.0, min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
            if hold:
                self._pace.hold(hold)
            self._pace.sleep(hold + pause)
        logger.warning(
            "the judge at %s gave no answer in %d tries; the last failure: %s; check "
            "reward.judge.url if no answer comes at all",
            self._url,
            self._settings.retries + 1,
            reason,
        )
        return None

    def _send(self, body: JsonObject) -> Answer | tuple[str, float]:
        """Return the answer, or (why there is none yet, how many seconds to wait)."""
        self.counts["requests"] += 1
        try:
            response = self._http.post(self._url, json=body)
        except httpx2.RequestError as error:
            return type(error).__name__, 0.0
        return self._read(response)

    def _read(self, response: httpx2.Response) -> Answer | tuple[str, float]:
        text = response.text
        if len(self._key) >= _SHORTEST_KEY:  # a server may repeat it in its answer
            text = text.replace(self._key, "[key]")
        status = response.status_code
        if status == 200:
            return _read_answer(text) or ("a reply that is no chat completion", 0.0)
        if status < 500 and status not in _PASSING:
            raise RewardError(
                f"reward.judge: {self._url} answers {status} to a request for model "
                f"{self._settings.model!r}: {shorten(text, 300)}; check reward.judge.url and "
                f".model, the key in {self._settings.key_variable or '(none is sent)'}, and "
                "reward.judge.parameters; the answers so far are kept"
            )
        hold = read_retry_after(response.headers.get("retry-after", ""))
        if hold > _LONGEST_HOLD:
            raise RewardError(
                f"reward.judge: {self._url} answers {status} and asks to come back in {hold:.0f} "
                "seconds; the answers so far are kept: run the same command again by then"
            )
        return f"status {status}", hold


def read_retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for, a number or a date, else 0."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0.0


def _read_answer(text: str) -> Answer | None:
    try:
        (choice, *_) = json.loads(text)["choices"]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if content is None:  # such as a refusal: an answer without a score
        content = ""
    return Answer(content, str(reason)) if isinstance(content, str) else None
