"""The judge's client against a server that answers, fails and misbehaves."""

import datetime
import email.utils
import threading
import time
from types import SimpleNamespace as Reply

import pytest

from halos_jax.config import ConfigError
from halos_jax.config.rewards import JudgeConfig
from halos_jax.rewards.judge.client import (
    Answer,
    Cancelled,
    JudgeClient,
    Pace,
    check_url,
    load_key,
    read_retry_after,
)
from halos_jax.rewards.labels import RewardError

KEY = "sk-secret-123"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def make_client(server, **settings):
    settings = {"retries": 3, "timeout": 5.0, "model": "m"} | settings
    return JudgeClient(JudgeConfig(url=server.url, **settings), KEY)


def test_an_answer_and_what_was_sent(server):
    server.reply = lambda question, before: Reply(text="well", finish_reason="length")
    client = make_client(server)
    assert client.ask(BODY) == Answer("well", "length")
    assert server.bodies == [BODY] and server.keys == [f"Bearer {KEY}"]
    server.reply = lambda question, before: Reply(text=None)
    assert client.ask(BODY) == Answer("", "stop")  # a refusal is an answer
    assert JudgeClient(JudgeConfig(url=server.url + "/"), "").ask(BODY) is not None
    assert server.keys[-1] is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=429), "status 429"),
        (Reply(status=500, raw="oops"), "status 500"),
        (Reply(status=503), "status 503"),
        (Reply(status=408), "status 408"),
        (Reply(hang_up=True), "RemoteProtocolError"),
        (Reply(delay=0.5), "ReadTimeout"),
        (Reply(raw="<html>busy</html>"), "a reply that is no chat completion"),
        (Reply(raw='{"choices": []}'), "a reply that is no chat completion"),
        (Reply(raw='{"error": "overloaded"}'), "a reply that is no chat completion"),
        (Reply(raw='{"choices": [{"message": {"content": 7}}]}'), "a reply that is no chat"),
        (Reply(raw='{"choices": [{"mess'), "a reply that is no chat completion"),
        (Reply(raw="[" * 100_000), "a reply that is no chat completion"),
        (Reply(raw="zip", headers={"content-encoding": "gzip"}), "DecodingError"),
    ],
)
def test_what_passes_is_tried_again_and_at_last_given_up(server, reply, reason, caplog):
    server.reply = lambda question, before: reply if before < 2 else "at last"
    client = make_client(server, timeout=0.1)
    assert client.ask(BODY) == Answer("at last", "stop")
    assert len(server.bodies) == 3 and client.counts["requests"] == 3
    assert [name for name in client.counts if name.startswith(reason)]
    server.reply = lambda question, before: reply
    assert make_client(server, timeout=0.1, retries=1).ask(BODY) is None
    assert len(server.bodies) == 5
    assert "no answer in 2 tries" in caplog.text and reason in caplog.text


def test_no_server_at_all(server):
    settings = JudgeConfig(url="http://127.0.0.1:9/v1", retries=1)
    client = JudgeClient(settings, KEY)
    assert client.ask(BODY) is None and client.counts["ConnectError"] == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 301])
def test_a_refusal_stops_at_once_and_hides_the_key(server, status, caplog):
    server.reply = lambda question, before: Reply(raw=f"no: Bearer {KEY}", status=status)
    with pytest.raises(RewardError, match=rf"answers {status} to a request .*'no: Bearer \[key\]'"):
        make_client(server).ask(BODY)
    assert len(server.bodies) == 1 and KEY not in caplog.text


def test_a_placeholder_for_a_key_leaves_answers_alone(server):
    """Local servers are often given one: "1" shall not make of "Final Score: 10" another score."""
    server.reply = lambda question, before: Reply(text="Final Score: 10")
    client = JudgeClient(JudgeConfig(url=server.url), "1")
    assert client.ask(BODY) == Answer("Final Score: 10", "stop")


def test_retry_after_holds_every_thread(server):
    server.reply = lambda question, before: (
        Reply(status=429, headers={"Retry-After": "0.5"}) if len(server.bodies) == 1 else "fine"
    )
    client = make_client(server)
    first = threading.Thread(target=client.ask, args=(BODY,))
    first.start()
    time.sleep(0.2)
    client.ask(BODY)  # of its own it would not wait
    first.join()
    assert [later - server.times[0] >= 0.45 for later in server.times] == [False, True, True]


def test_a_server_that_asks_to_wait_for_hours(server):
    server.reply = lambda *_: Reply(status=429, headers={"Retry-After": "7200"})
    with pytest.raises(RewardError, match="answers 429 and asks to come back in 7200 seconds"):
        make_client(server).ask(BODY)


def test_retry_after_is_seconds_or_a_date():
    assert read_retry_after("3") == 3.0 and read_retry_after("0.5") == 0.5
    for value in ("", "soon", "-3", "nan", "inf"):
        assert read_retry_after(value) == 0.0
    for seconds, low, high in ((30, 27, 30), (-30, 0, 0)):
        date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        found = read_retry_after(email.utils.format_datetime(date, usegmt=True))
        assert low <= found <= high


def test_the_pace_is_kept_over_all_threads():
    pace, times = Pace(1200, threading.Event()), []  # one in 50 ms

    def leave():
        pace.wait()
        times.append(time.monotonic())

    threads = [threading.Thread(target=leave) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    assert times[-1] - times[0] >= 4 * 0.05 - 0.02
    # After a hold those who waited leave at the same pace, not all at once.
    pace.hold(0.2)
    start, times = time.monotonic(), []
    threads = [threading.Thread(target=leave) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(times) - start >= 0.18 and max(times) - min(times) >= 2 * 0.05 - 0.02


def test_a_client_that_is_stopped_does_not_wait(server):
    server.reply = lambda *_: Reply(status=429, headers={"Retry-After": "600"})
    client, ends = make_client(server), []

    def ask():
        with pytest.raises(Cancelled):
            client.ask(BODY)
        ends.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    client.stop()
    thread.join(5)
    assert ends and len(server.bodies) == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    assert load_key("JUDGE_KEY") == KEY and load_key("") == ""
    for value in ("", "two words", "sk-\n-x", "schlüssel"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(ConfigError, match="variable JUDGE_KEY holds ") as caught:
            load_key("JUDGE_KEY")
        assert not value or value not in str(caught.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds nothing"):
        load_key("JUDGE_KEY")


def test_an_address_that_is_none():
    check_url("http://localhost:8000/v1")
    with pytest.raises(ConfigError, match=r"reward\.judge\.url: got 'http://host:port/v1'"):
        check_url("http://host:port/v1")


def test_a_first_contact_costs_nothing_and_a_dead_server_is_said_at_once(server):
    make_client(server).reach()  # which this server does not know: it answers all the same
    assert server.bodies == []
    client = JudgeClient(JudgeConfig(url="http://127.0.0.1:9/v1", retries=6), KEY)
    for contact in (client.reach, lambda: client.probe(BODY)):
        start = time.monotonic()
        with pytest.raises(RewardError) as caught:
            contact()
        assert time.monotonic() - start < 1
        message = str(caught.value)
        assert message.startswith("reward.judge.url: nothing listens at 127.0.0.1:9 (")
        assert "refused" in message and "--config.reward.judge.url=URL" in message


def test_a_probe_is_one_request_that_tells_a_refusal_from_what_passes(server, caplog):
    make_client(server).probe(BODY)
    assert server.bodies == [BODY] and not caplog.text
    for status in (401, 404):
        server.reply = lambda question, before, status=status: Reply(status=status, raw="no")
        with pytest.raises(RewardError, match=rf"answers {status} to a request for model 'm'"):
            make_client(server).probe(BODY)
    for reply, reason in ((Reply(status=503), "status 503"), (Reply(delay=0.5), "ReadTimeout")):
        server.reply = lambda question, before, reply=reply: reply
        make_client(server, timeout=0.1).probe(BODY)
        assert f"the first request failed for now: {reason}" in caplog.text
    assert len(server.bodies) == 5
