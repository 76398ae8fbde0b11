"""Any OpenAI-compatible endpoint as a Model: prompts leave as text, answers come back with what they cost.

Owns the shapes of requests and answers: messages, thinking, stop strings, usage, log-probabilities.  What is known of
the served model beside its weights (tokenizer, template, costs) is handed in.  Knows no engine and no command line.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .endpoint_http import NotFoundError, Server
from .errors import EvalError, ModelError, UnsupportedError
from .model import Context, Cost, Finish, Ids, Progress, Prompt, Reply, Score, Settings

_THINK, _END_THINK = "<think>", "</think>"
# Names under which servers say how many tokens they take: vLLM and SGLang, Groq, OpenRouter, LM Studio.
_CTX_NAMES = ("max_model_len", "context_window", "context_length", "max_context_length")
_NOT_OPENAI = "Is its API OpenAI-compatible?"
_MOST_STOPS = 4  # what OpenAI's API takes; further ones are looked for here


class Served(Protocol):
    """What is known here of the model that is served there, without its weights (methods as in `Model`)."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Ids) -> str: ...
    def overhead(self, prompt: Prompt, settings: Settings) -> int: ...
    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None: ...


@dataclass(frozen=True)
class Endpoint:
    """A Model behind HTTP.  Chat prompts go to /chat/completions, plain ones to /completions.

    Contexts cost nothing to read: each question sends the whole prompt, and the server's own prefix cache shares what
    it can (cached tokens, as it reports them).  A reply's decode_s is the whole request; prefill_s is 0.
    body: fields merged into every request; None takes one out.
    """

    server: Server
    served: Served
    name: str
    ctx: int
    body: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        url: str,
        served: Served,
        *,
        model: str | None = None,
        key: str | None = None,
        ctx: int | None = None,
        timeout_s: float = 1800.0,
        retries: int = 4,
        body: Mapping[str, Any] | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Endpoint:
        """Ask the server at ``url`` what it serves.

        model: its name there, by default the only one.  ctx: tokens of prompt and answer together, by default what
        the server says.  timeout_s and retries as in `Server`.  Raises EvalError for what cannot be settled, and
        ModelError when the server does not answer.
        """
        server = Server(url, key, timeout_s, retries, wait)
        listed = _listed(server, optional=model is not None and ctx is not None)
        if model is None:
            if len(listed) != 1:
                names = ", ".join(list(listed)[:10]) or "none"
                raise EvalError(f"{server.url} lists {len(listed)} models: {names}", "Name one with --endpoint-model.")
            model = next(iter(listed))
        known = _ctx_of(listed.get(model, {}))
        if ctx is None:
            ctx = known
        if ctx is None:
            raise EvalError(f"{server.url} does not say how long a context {model} takes", "Say so with --ctx.")
        if known is not None and ctx > known:
            raise EvalError(
                f"a context of {ctx:,} tokens is beyond the {known:,} that {server.url} takes", "Give a smaller --ctx."
            )
        return cls(server, served, model, ctx, dict(body or {}))

    @property
    def fingerprint(self) -> str:
        """Of address, name and added fields: whether the weights behind them stay the same, nobody here can tell."""
        identity = json.dumps([self.server.url, self.name, self.body], sort_keys=True)
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def about(self) -> Mapping[str, Any]:
        return {"endpoint": self.server.url, "model": self.name, "body": self.body}

    def encode(self, text: str) -> list[int]:
        return self.served.encode(text)

    def decode(self, ids: Ids) -> str:
        return self.served.decode(ids)

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        return self.served.overhead(prompt, settings)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        return self.served.cost(prompt_tokens, completion_tokens)

    def read(self, prompt: Prompt, settings: Settings, progress: Progress | None = None) -> Context:
        own = len(prompt.ids) + sum(len(turn.ids) for turn in prompt.turns)
        return _Sent(self, prompt, settings, own + self.overhead(prompt, settings))

    def post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer to ``body`` with this endpoint's model and added fields; raises as `Server.post`."""
        merged = {"model": self.name, **body, **self.body}
        return self.server.post(path, {name: value for name, value in merged.items() if value is not None})


@dataclass(frozen=True)
class _Sent:
    """A Context that only remembers its prompt.  tokens: by the tokenizer at hand."""

    endpoint: Endpoint
    prompt: Prompt
    settings: Settings
    tokens: int
    prefill_s: float = 0.0
    cached_tokens: int = 0

    def ask(self, ids: Ids, settings: Settings, opening: Ids = ()) -> Reply:
        chat = self.prompt.chat
        thinking = chat and settings.thinking != "none"
        decode = self.endpoint.decode
        body: dict[str, Any] = {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "stream": False,
        }
        # A server looks for stop strings in the reasoning too: then they wait until the answer is here.
        if settings.stop and not thinking:
            body["stop"] = list(settings.stop[:_MOST_STOPS])
        if chat:
            body["messages"] = self._messages(ids, opening)
            body |= _thinking_fields(settings)
            if opening:
                body |= {"continue_final_message": True, "add_generation_prompt": False}  # vLLM, SGLang
        else:
            body["prompt"] = decode([*self.prompt.ids, *ids, *opening])
        started = time.perf_counter()
        data = self.endpoint.post("/chat/completions" if chat else "/completions", body)
        seconds = time.perf_counter() - started
        local_tokens = self.tokens + len(ids) + len(opening)
        return _reply(data, self.endpoint, settings, thinking, decode(opening), local_tokens, seconds)

    def score(self, ids: Ids, continuation: Ids, opening: Ids = ()) -> Score:
        """By /completions with echo, for plain prompts: no chat API returns log-probabilities of what it is given.

        Raises ModelError when the server cuts the continuation into other tokens than the tokenizer at hand.
        """
        if self.prompt.chat:
            raise UnsupportedError(
                "no endpoint returns log-probabilities of given answers in a chat",
                "Use tasks that generate answers, or --no-chat.",
            )
        text = self.endpoint.decode([*self.prompt.ids, *ids, *opening, *continuation])
        body = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1, "stream": False}
        data = self.endpoint.post("/completions", body)
        return _score(data, self.endpoint, continuation)

    def _messages(self, ids: Ids, opening: Ids) -> list[dict[str, Any]]:
        decode = self.endpoint.decode
        messages: list[dict[str, Any]] = [{"role": t.role, "content": decode(t.ids)} for t in self.prompt.turns]
        messages.append({"role": "user", "content": decode([*self.prompt.ids, *ids])})
        if opening:
            messages.append({"role": "assistant", "content": decode(opening), "prefix": True})  # DeepSeek's name for it
        return messages


# -- what a server lists


def _listed(server: Server, optional: bool) -> dict[str, Mapping[str, Any]]:
    """Models by name.  optional: a server without a list is no error; one that is down or wants a key is."""
    try:
        data = server.get("/models").get("data")
    except NotFoundError:
        if not optional:
            raise
        return {}
    entries = data if isinstance(data, list) else []
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)}


def _ctx_of(entry: Mapping[str, Any]) -> int | None:
    meta = entry.get("meta")  # llama.cpp's
    values = [entry.get(name) for name in _CTX_NAMES] + [meta.get("n_ctx") if isinstance(meta, dict) else None]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


# -- requests and answers


def _thinking_fields(settings: Settings) -> dict[str, Any]:
    """DeepSeek's own API reads the first and the last, vLLM and SGLang the template's arguments."""
    on = settings.thinking != "none"
    fields: dict[str, Any] = {
        "thinking": {"type": "enabled" if on else "disabled"},
        "chat_template_kwargs": {"thinking": on, "enable_thinking": on},
    }
    if settings.thinking == "max":  # "high" is what thinking means without a word about effort
        fields["reasoning_effort"] = "max"
        fields["chat_template_kwargs"]["reasoning_effort"] = "max"
    return fields


def _choice(data: Mapping[str, Any], endpoint: Endpoint) -> Mapping[str, Any]:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ModelError(f"{endpoint.server.url} answers without choices: {json.dumps(data)[:80]}", _NOT_OPENAI)
    return choices[0]


def _reply(
    data: Mapping[str, Any],
    endpoint: Endpoint,
    settings: Settings,
    thinking: bool,
    opening: str,
    local_tokens: int,
    seconds: float,
) -> Reply:
    choice = _choice(data, endpoint)
    message = choice.get("message", {"content": choice.get("text")})
    message = message if isinstance(message, dict) else {"content": message}
    content, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    nothing = content is None and reasoning is None and not message.get("tool_calls")
    if nothing or not isinstance(content, str | None) or not isinstance(reasoning, str | None):
        raise ModelError(f"{endpoint.server.url} answers without text: {json.dumps(choice)[:80]}", _NOT_OPENAI)
    why = choice.get("finish_reason")
    if why == "content_filter":
        raise ModelError(f"{endpoint.server.url} withheld the answer (content filter)")
    written = (reasoning or "") + (content or "")
    text, thoughts, unclosed = _split(content or "", reasoning, thinking and why == "length")
    text = text.removeprefix(opening) if opening else text  # some servers repeat what they continue

    usage = data.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt_tokens = _count(usage.get("prompt_tokens")) or local_tokens
    completion_tokens = _count(usage.get("completion_tokens")) or len(endpoint.encode(written))
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    cached = cached or _count(usage.get("prompt_cache_hit_tokens"))

    cut = min((place for stop in settings.stop if (place := text.find(stop)) >= 0), default=-1)
    finish: Finish = "stop"
    if cut >= 0 or (why == "stop" and choice.get("stop_reason") in settings.stop):
        text, finish = text[:cut] if cut >= 0 else text, "stop_string"
    elif why == "length":
        full = prompt_tokens + completion_tokens >= endpoint.ctx
        finish = "length_thinking" if unclosed else "context_full" if full else "length"
    elif why == "tool_calls":
        finish = "tool_calls"
    return Reply(
        text=text,
        reasoning=thoughts,
        finish=finish,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached,
        completion_tokens=completion_tokens,
        prefill_s=0.0,
        decode_s=seconds,
    )


def _split(content: str, reasoning: str | None, cut_short: bool) -> tuple[str, str, bool]:
    """Answer, reasoning, and whether the reasoning was never closed.

    The answer is what follows the last </think>, wherever the server puts the reasoning: in a field of its own, in
    tags, or (the template opened <think> and no parser runs) without the opening tag.  cut_short: the tokens ran out
    in a thinking answer; one with no sign of an end to the thinking is all reasoning then.
    """
    before, closed, after = content.rpartition(_END_THINK)
    opened = content.lstrip().startswith(_THINK)
    if closed:
        return after, (reasoning or "") + before.lstrip().removeprefix(_THINK), False
    if opened:
        return "", (reasoning or "") + content.lstrip().removeprefix(_THINK), True
    if cut_short and not (reasoning and content):
        return "", (reasoning or "") + content, True
    return content, reasoning or "", False


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _score(data: Mapping[str, Any], endpoint: Endpoint, continuation: Ids) -> Score:
    unsupported = UnsupportedError(
        f"{endpoint.server.url} returns no log-probabilities of the prompt (echo with logprobs)",
        "Use tasks that generate answers, or a server that has them, such as vLLM.",
    )
    found = _choice(data, endpoint).get("logprobs")
    if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
        raise unsupported
    logprobs, words, best = found["token_logprobs"], found.get("tokens"), found.get("top_logprobs")
    if not isinstance(words, list) or not isinstance(best, list) or not len(words) == len(logprobs) == len(best):
        raise unsupported
    many = len(continuation)
    text = endpoint.decode(continuation)
    # The one token that the server had to draw comes last, unless it was the end and is not shown.
    for end in (len(words) - 1, len(words)):
        start = end - many
        if start < 0 or _spelt(words[start:end], text) is False:
            continue
        if not all(isinstance(value, int | float) for value in logprobs[start:end]):
            raise unsupported  # the very first token of a text has nothing before it
        greedy = all(
            isinstance(top, dict) and value >= max(top.values(), default=-float("inf"))
            for value, top in zip(logprobs[start:end], best[start:end], strict=True)
        )
        return Score(float(sum(logprobs[start:end])), greedy, many)
    raise ModelError(
        f"{endpoint.server.url} cuts {text[:40]!r} into other tokens than the tokenizer given",
        "Name the served model's tokenizer with --model.",
    )


def _spelt(words: list[Any], text: str) -> bool | None:
    """Whether the tokens spell the text; None where one is part of a character, which servers write each their way."""
    parts = [str(word) for word in words]
    if any("\ufffd" in part or part.startswith("bytes:") for part in parts):
        return None
    return "".join(parts) == text
