"""A judge's server in this process, which answers, or fails, as a test says."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from halos_jax.rewards.judge import client as judge_client


@dataclasses.dataclass
class Reply:
    """What the server does with one request; tests write it as a SimpleNamespace."""

    text: str | None = ""
    status: int = 200
    raw: str | None = None  # the whole body, where it is no chat completion
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0.0  # seconds
    hang_up: bool = False
    finish_reason: str = "stop"


@dataclasses.dataclass
class Server:
    """`reply` makes of (question, how often it was asked before) a Reply, or its text alone."""

    url: str = ""
    reply: Callable[[str, int], Any] = lambda question, before: "Final Score: 5"
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    keys: list[str | None] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    most_at_once: int = 0

    @property
    def questions(self) -> list[str]:
        """The user messages of all requests, in order."""
        return [body["messages"][-1]["content"] for body in self.bodies]


@pytest.fixture
def server(monkeypatch):
    """Yield a running Server; the pauses before retries are short."""
    monkeypatch.setattr(judge_client, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    state, lock, under_way = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            question = body["messages"][-1]["content"]
            with lock:
                before = state.questions.count(question)
                state.bodies.append(body)
                state.keys.append(self.headers["authorization"])
                state.times.append(time.monotonic())
                under_way[0] += 1
                state.most_at_once = max(state.most_at_once, under_way[0])
            reply = state.reply(question, before)
            reply = Reply(reply) if isinstance(reply, str) else Reply(**vars(reply))
            time.sleep(reply.delay)
            with lock:
                under_way[0] -= 1
            if reply.hang_up:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            choice = {"message": {"content": reply.text}, "finish_reason": reply.finish_reason}
            text = json.dumps({"choices": [choice]}) if reply.raw is None else reply.raw
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(text.encode())), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # a client that gave up
            pass

    running = Quiet(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{running.server_port}/v1"
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    running.shutdown()
    running.server_close()
