"""Requests to an OpenAI-compatible server: JSON both ways, patience where waiting helps, and a name for each failure.

Owns the connection, the retries and the meaning of status codes.  Knows nothing of prompts, answers or tasks.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from .errors import EvalError, ModelError, TooLongError

_CONNECT_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
# Busy, overloaded, restarting: the same request may succeed a little later.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
# vLLM, SGLang, llama.cpp, OpenAI, DeepSeek and Anthropic-like gateways each say it in words of their own.
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|max_model_len|max_total_tokens|(prompt|input|request) (is|was)? ?too long"
    r"|too many (input |prompt )?tokens|longer than the model",
    re.IGNORECASE,
)
_BODY_HINT = """--endpoint-body '{"FIELD": null}' leaves a field out of the requests, if the server does not take it."""


def base_url(url: str) -> str:
    """``url`` without a slash at its end; an address without a path gets /v1.  Raises EvalError if it is none."""
    hint = "Give it as http://HOST:PORT/v1."
    try:
        parsed = httpx2.URL(url.strip())
    except (httpx2.InvalidURL, TypeError):
        raise EvalError(f"{url!r} is not an address", hint) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EvalError(f"{url!r} is not an http or https address", hint)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise EvalError("the address holds more than host and path", "A key goes into the environment: DSV4_API_KEY.")
    return str(parsed.copy_with(path=parsed.path.rstrip("/") or "/v1"))


class NotFoundError(ModelError):
    """The server answers, but has nothing at this path, or no model of this name."""


class Server:
    """One server.  Requests are sent one after the other; nothing is sent before the first of them."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 1800.0,
        retries: int = 4,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """timeout_s: the longest silence in an answer.  retries: how often a passing failure is tried again.

        Raises EvalError for an address that is none.
        """
        self.url = base_url(url)
        self._key, self._timeout_s, self._retries, self._wait = key, timeout_s, retries, wait
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_S))

    def get(self, path: str) -> Mapping[str, Any]:
        """The JSON object at ``path``; errors as in `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON object that answers ``body``.

        Raises TooLongError when the server says that the prompt does not fit, else ModelError: fatal where no later
        request can do better (nobody listens, wrong key, no such path or model, no credit left).
        """
        return self._request("POST", path, body)

    def close(self) -> None:
        self._client.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        url = self.url + path
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            wait_s = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
            try:
                answer = self._client.request(method, url, json=body)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if last:
                    hint = "Start the server, or correct the address."
                    raise ModelError(f"{self.url} cannot be reached: {error}", hint, fatal=True) from error
            except httpx2.TimeoutException as error:  # not tried again: it may still be at work on this one
                hint = "Give it longer with --endpoint-timeout."
                raise ModelError(f"{url} did not answer within {self._timeout_s:g} s", hint) from error
            except httpx2.TransportError as error:
                if last:
                    raise ModelError(f"the connection to {url} broke: {error}", "See the server's log.") from error
            else:
                if answer.is_success:
                    return _json_object(answer)
                failure = self._failure(answer, url)
                if last or failure.fatal or isinstance(failure, TooLongError) or answer.status_code not in _PASSING:
                    raise failure
                wait_s = max(wait_s, _retry_after(answer))
            self._wait(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, answer: httpx2.Response, url: str) -> ModelError:
        status = answer.status_code
        words = _words(answer)
        if self._key:  # some servers repeat the key that they refuse
            words = words.replace(self._key, "***")
        said = f"{url} answers {status}" + (f": {words}" if words else "")
        if status in (401, 403):
            return ModelError(said, "Give the server's key as DSV4_API_KEY in the environment.", fatal=True)
        if status == 402 or "insufficient_quota" in words:
            return ModelError(said, "The account has no credit left.", fatal=True)
        if status == 413 or _TOO_LONG.search(words):
            return TooLongError(said, "Choose shorter lengths, or serve the model with a larger context.")
        if status == 404:
            hint = "Check the address (it usually ends in /v1) and the model's name (--endpoint-model)."
            return NotFoundError(said, hint, fatal=True)
        if 300 <= status < 400:
            return ModelError(f"{url} sends on to {answer.headers.get('location')}", "Give that address.", fatal=True)
        return ModelError(said, _BODY_HINT if status in (400, 422) else "See the server's log.")


def _json_object(answer: httpx2.Response) -> Mapping[str, Any]:
    try:
        data = answer.json()
    except ValueError:  # not JSON, or not text
        data = None
    if not isinstance(data, dict):
        start = answer.text[:80] + ("..." if len(answer.text) > 80 else "")
        raise ModelError(
            f"{answer.url} answers no JSON object but {start!r}", "Is this an OpenAI-compatible API? It ends in /v1."
        )
    return data


def _words(answer: httpx2.Response) -> str:
    """What the server says is wrong, in one line: OpenAI's, vLLM's and FastAPI's shapes, else the body itself."""
    try:
        data = answer.json()
    except ValueError:
        data = answer.text
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        parts = [error.get(key) for key in ("message", "detail", "code", "type")]
        error = " ".join(str(part) for part in parts if part) or error
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + "..."


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds the server asks for, at most a minute; 0 where it asks for none."""
    try:
        seconds = float(answer.headers.get("retry-after", ""))
    except ValueError:  # absent, or a date
        return 0.0
    return min(seconds, _LONGEST_WAIT_S) if math.isfinite(seconds) else 0.0
