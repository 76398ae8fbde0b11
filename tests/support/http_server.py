"""A small OpenAI-compatible server for tests: answers by a function, or with a model of the evaluations' Protocol.

Runs in a thread on a free port of this machine and keeps what it was asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dsv4_evals.errors import TooLongError
from dsv4_evals.model import Model, Prompt, Settings, Turn


@dataclass(frozen=True)
class Request:
    """What a client sent.  body is None for GET."""

    method: str
    path: str
    body: Any
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """What it gets.  body: an object becomes JSON; bytes are sent as they are.  hang: seconds to say nothing first;
    None for the status closes the connection without a word."""

    body: Any = None
    status: int | None = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: threading.Event | None = None


Answer = Callable[[Request], Response]


@dataclass(frozen=True)
class Running:
    """A server that runs.  url ends in /v1."""

    url: str
    requests: list[Request]

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests if request.method == "POST"]


@contextmanager
def serving(answer: Answer) -> Iterator[Running]:
    """The server, until the block is left."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer("POST", json.loads(raw))

        def _answer(self, method: str, body: Any) -> None:
            request = Request(method, self.path, body, dict(self.headers))
            requests.append(request)
            response = answer(request)
            if response.hang is not None:
                response.hang.wait(30)
            if response.status is None:
                self.connection.close()
                return
            raw = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
            self.send_response(response.status)
            for name, value in {"Content-Type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def models(*entries: Mapping[str, Any]) -> Response:
    """What GET /models answers."""
    return Response({"object": "list", "data": list(entries)})


def chat_reply(content: str | None, finish: str = "stop", usage: Any = None, **message: Any) -> Response:
    """What POST /chat/completions answers."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return Response({"choices": [choice], **({} if usage is None else {"usage": usage})})


def error(status: int, message: str, **headers: str) -> Response:
    """A failure in OpenAI's shape."""
    return Response({"error": {"message": message}}, status, headers)


class Served:
    """A Protocol's model behind HTTP, for `serving`: the same prompts give the same answers as the model itself."""

    def __init__(self, model: Model, key: str | None = None) -> None:
        self._model, self._key = model, key
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Response:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return error(401, "wrong key")
        if request.path == "/v1/models":
            return models({"id": "served", "max_model_len": self._model.ctx})
        with self._lock:
            try:
                if request.path == "/v1/chat/completions":
                    return self._chat(request.body)
                if request.path == "/v1/completions":
                    return self._echo(request.body) if request.body.get("echo") else self._plain(request.body)
            except TooLongError:
                return error(400, f"This model's maximum context length is {self._model.ctx} tokens.")
        return error(404, "no such path")

    def _settings(self, body: Any) -> Settings:
        on = body.get("thinking", {}).get("type") == "enabled"
        return Settings(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            seed=body["seed"],
            thinking=("max" if body.get("reasoning_effort") == "max" else "high") if on else "none",
            stop=tuple(body.get("stop", ())),
        )

    def _chat(self, body: Any) -> Response:
        messages, opening = list(body["messages"]), ""
        if messages[-1]["role"] == "assistant":
            opening = messages.pop()["content"]
        turns = tuple(Turn(m["role"], self._model.encode(m["content"])) for m in messages[:-1])
        settings = self._settings(body)
        context = self._model.read(Prompt(self._model.encode(messages[-1]["content"]), turns), settings)
        reply = context.ask((), settings, self._model.encode(opening))
        usage = self._usage(reply)
        finish = "length" if reply.finish in ("length", "length_thinking", "context_full") else "stop"
        return chat_reply(reply.text, finish, usage, reasoning_content=reply.reasoning or None)

    def _plain(self, body: Any) -> Response:
        settings = self._settings(body)
        context = self._model.read(Prompt(self._model.encode(body["prompt"]), chat=False), settings)
        reply = context.ask((), settings)
        finish = "length" if reply.finish in ("length", "context_full") else "stop"
        return Response(
            {"choices": [{"index": 0, "text": reply.text, "finish_reason": finish}], "usage": self._usage(reply)}
        )

    def _echo(self, body: Any) -> Response:
        """Log-probabilities of the prompt's tokens, each taken by itself, and one more token."""
        ids = self._model.encode(body["prompt"])
        logprobs: list[float | None] = []
        best: list[dict[str, float] | None] = []
        for place, token in enumerate(ids):
            score = self._model.read(Prompt(ids[:place], chat=False), Settings(1)).score((), [token])
            logprobs.append(score.logprob)
            best.append({self._model.decode([token]): score.logprob, "?": score.logprob - 1 if score.greedy else 0.0})
        words = [self._model.decode([token]) for token in ids]
        found = {"tokens": [*words, "!"], "token_logprobs": [*logprobs, -1.0], "top_logprobs": [*best, {"!": -1.0}]}
        return Response({"choices": [{"text": body["prompt"] + "!", "logprobs": found, "finish_reason": "length"}]})

    def _usage(self, reply: Any) -> dict[str, Any]:
        return {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
        }
