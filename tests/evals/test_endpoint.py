"""Endpoints over real HTTP to a small server on this machine: requests, answers, and everything that can go wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="httpx2 is not installed")

from dsv4_evals.endpoint import Endpoint
from dsv4_evals.endpoint_http import base_url
from dsv4_evals.errors import EvalError, ModelError, TooLongError, UnsupportedError
from dsv4_evals.model import Prompt, Reply, Settings, Turn
from support.http_server import Request, Response, Served, chat_reply, error, models, serving
from support.scripted_model import ScriptedModel

ENTRY = {"id": "served", "max_model_len": 1000}
SETTINGS = Settings(max_tokens=16)
KNOWN = ScriptedModel()  # tokenizer, template and costs only


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ids(text: str) -> list[int]:
    return KNOWN.encode(text)


def answering(reply: Callable[[Any], Response] | Response) -> Callable[[Request], Response]:
    """A server that lists one model and answers questions with ``reply``."""

    def answer(request: Request) -> Response:
        if request.method == "GET":
            return models(ENTRY)
        return reply(request.body) if callable(reply) else reply

    return answer


def ask(reply: Response, settings: Settings = SETTINGS, prompt: Prompt | None = None, **options: Any) -> Reply:
    """One question to a server that answers it so."""
    with serving(answering(reply)) as server:
        endpoint = Endpoint.open(server.url, KNOWN, wait=lambda s: None, **options)
        return endpoint.read(prompt or Prompt(ids("doc ")), settings).ask(ids("why?"), settings)


# -- what is sent


def test_a_chat_request() -> None:
    with serving(answering(chat_reply("because"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN, key="secret")
        prompt = Prompt(ids("the doc. "), (Turn("system", ids("be brief")), Turn("user", ids("hi"))))
        settings = Settings(16, temperature=0.5, top_p=0.9, seed=7, stop=("\n", "END"))
        context = endpoint.read(prompt, settings)
        reply = context.ask(ids("why?"), settings, opening=ids("It is"))
        (body,) = server.bodies
        assert server.requests[-1].path == "/v1/chat/completions"
        assert server.requests[-1].headers["Authorization"] == "Bearer secret"
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "the doc. why?"},
        {"role": "assistant", "content": "It is", "prefix": True},
    ]
    assert body["model"] == "served"
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (16, 0.5, 0.9, 7)
    assert body["stop"] == ["\n", "END"]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["thinking"] == {"type": "disabled"} and body["chat_template_kwargs"]["thinking"] is False
    assert "reasoning_effort" not in body
    assert reply.text == "because"
    assert context.tokens == len("be briefhithe doc. ") + KNOWN.overhead(prompt, settings)


@pytest.mark.parametrize(("thinking", "effort"), [("high", None), ("max", "max")])
def test_thinking_is_asked_for_and_stop_strings_wait_until_it_is_over(thinking: Any, effort: str | None) -> None:
    with serving(answering(chat_reply("one\ntwo", reasoning_content="a\nb"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        settings = Settings(16, thinking=thinking, stop=("\n",))
        reply = endpoint.read(Prompt(ids("x")), settings).ask((), settings)
        (body,) = server.bodies
    assert body["thinking"] == {"type": "enabled"} and body["chat_template_kwargs"]["thinking"] is True
    assert body.get("reasoning_effort") == effort == body["chat_template_kwargs"].get("reasoning_effort")
    assert "stop" not in body
    assert (reply.text, reply.reasoning, reply.finish) == ("one", "a\nb", "stop_string")


def test_a_plain_request() -> None:
    with serving(answering(Response({"choices": [{"text": " Paris", "finish_reason": "stop"}]}))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        reply = endpoint.read(Prompt(ids("The capital "), chat=False), SETTINGS).ask(ids("is"), SETTINGS)
        (body,) = server.bodies
        assert server.requests[-1].path == "/v1/completions"
    assert body["prompt"] == "The capital is" and "messages" not in body and "thinking" not in body
    assert (reply.text, reply.finish) == (" Paris", "stop")


def test_fields_can_be_added_and_left_out() -> None:
    with serving(answering(chat_reply("x"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN, body={"thinking": None, "seed": None, "priority": 3})
        endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
        (body,) = server.bodies
        plain = Endpoint.open(server.url, KNOWN)
    assert "thinking" not in body and "seed" not in body and body["priority"] == 3
    assert plain.fingerprint != endpoint.fingerprint
    assert endpoint.about()["body"] == {"thinking": None, "seed": None, "priority": 3}


def test_more_stop_strings_than_servers_take() -> None:
    stops = tuple("12345")
    with serving(answering(chat_reply("a5b"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        settings = Settings(16, stop=stops)
        reply = endpoint.read(Prompt(ids("x")), settings).ask((), settings)
        assert server.bodies[0]["stop"] == list("1234")
    assert (reply.text, reply.finish) == ("a", "stop_string")


# -- what comes back


@pytest.mark.parametrize(
    ("reply", "text", "reasoning", "finish"),
    [
        (chat_reply("42", reasoning_content="hm"), "42", "hm", "stop"),
        (chat_reply("42", reasoning="hm"), "42", "hm", "stop"),
        (chat_reply("<think>hm</think>42"), "42", "hm", "stop"),
        (chat_reply("hm</think>42"), "42", "hm", "stop"),
        (chat_reply("<think>a</think>b</think>42"), "42", "a</think>b", "stop"),
        (chat_reply("42", finish="length", reasoning_content="hm"), "42", "hm", "length"),
        (chat_reply("hm</think>4", finish="length"), "4", "hm", "length"),
        (chat_reply(None, finish="length", reasoning_content="hm"), "", "hm", "length_thinking"),
        (chat_reply("", finish="length", reasoning_content="hm"), "", "hm", "length_thinking"),
        (chat_reply("<think>hm", finish="length"), "", "hm", "length_thinking"),
        (chat_reply("hm", finish="length"), "", "hm", "length_thinking"),
        (chat_reply("42"), "42", "", "stop"),
    ],
)
def test_the_answer_is_what_follows_the_thinking(reply: Response, text: str, reasoning: str, finish: str) -> None:
    found = ask(reply, Settings(16, thinking="high"))
    assert (found.text, found.reasoning, found.finish) == (text, reasoning, finish)


def test_without_thinking_a_short_limit_cuts_the_answer() -> None:
    found = ask(chat_reply("four and fo", finish="length"))
    assert (found.text, found.reasoning, found.finish) == ("four and fo", "", "length")


def test_a_server_that_thinks_unasked() -> None:
    found = ask(chat_reply("<think>hm</think>42"))
    assert (found.text, found.reasoning) == ("42", "hm")


def test_a_full_context() -> None:
    usage = {"prompt_tokens": 990, "completion_tokens": 10}
    assert ask(chat_reply("4", finish="length", usage=usage)).finish == "context_full"


def test_a_server_that_repeats_the_opening() -> None:
    with serving(answering(chat_reply("It is red"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        reply = endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS, opening=ids("It is"))
    assert reply.text == " red"


def test_tool_calls_are_no_text() -> None:
    found = ask(chat_reply(None, finish="tool_calls", tool_calls=[{"id": "1"}]))
    assert (found.text, found.finish) == ("", "tool_calls")


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}, 5),
        ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_cache_hit_tokens": 6}, 6),
        ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None}, 0),
    ],
)
def test_usage_of_the_server(usage: Any, cached: int) -> None:
    found = ask(chat_reply("text", usage=usage))
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (9, 4, cached)
    assert found.decode_s > 0


@pytest.mark.parametrize("usage", [None, {}, "none", {"prompt_tokens": None}, {"prompt_tokens": "many"}])
def test_tokens_are_counted_here_when_the_server_does_not(usage: Any) -> None:
    found = ask(chat_reply("text", usage=usage))
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (len("doc why?") + 2, 4, 0)


def test_costs_are_those_of_the_served_model() -> None:
    with serving(answering(chat_reply("x"))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
    assert endpoint.cost(10, 2) == KNOWN.cost(10, 2)


# -- opening


def test_name_and_context_come_from_the_server() -> None:
    with serving(lambda request: models({"id": "v4", "max_model_len": 131072})) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        assert (endpoint.name, endpoint.ctx) == ("v4", 131072)
        assert Endpoint.open(server.url, KNOWN, ctx=4096).ctx == 4096
        with pytest.raises(EvalError, match="beyond the 131,072"):
            Endpoint.open(server.url, KNOWN, ctx=131073)


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([], {}, "lists 0 models"),
        ([{"id": "a"}, {"id": "b"}], {}, "lists 2 models: a, b"),
        ([{"id": "a"}], {}, "does not say how long a context a takes"),
        ([{"id": "a", "max_model_len": "long"}], {}, "does not say how long"),
    ],
)
def test_what_a_server_leaves_open_must_be_said(entries: list[Any], options: Any, message: str) -> None:
    with serving(lambda request: models(*entries)) as server, pytest.raises(EvalError, match=message) as caught:
        Endpoint.open(server.url, KNOWN, **options)
    assert caught.value.hint


def test_a_server_without_a_list_of_models() -> None:
    with serving(lambda request: error(404, "nothing here")) as server:
        assert Endpoint.open(server.url, KNOWN, model="m", ctx=512).name == "m"
        with pytest.raises(ModelError, match="answers 404"):
            Endpoint.open(server.url, KNOWN, ctx=512)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://api.deepseek.com/beta/", "https://api.deepseek.com/beta"),
        (" http://host/openai/v1 ", "http://host/openai/v1"),
    ],
)
def test_addresses(given: str, used: str) -> None:
    assert base_url(given) == used


@pytest.mark.parametrize(
    "given", ["host:8000", "ftp://host", "", "http://", "http://k:secret@host", "http://h/v1?key=1"]
)
def test_wrong_addresses(given: str) -> None:
    with pytest.raises(EvalError) as caught:
        base_url(given)
    assert caught.value.hint and "secret" not in str(caught.value)


# -- what goes wrong


def opened(url: str, waits: list[float], **options: Any) -> Endpoint:
    return Endpoint.open(url, KNOWN, model="served", ctx=1000, wait=waits.append, **options)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits: list[float] = []
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        opened(f"http://127.0.0.1:{port}", waits, retries=3)
    assert caught.value.fatal and caught.value.hint
    assert waits == [1, 2, 4]


def test_a_slow_answer_is_an_error_of_its_sample() -> None:
    never = threading.Event()
    with serving(answering(lambda body: Response({}, hang=never))) as server:
        endpoint = opened(server.url, [], timeout_s=0.2)
        with pytest.raises(ModelError, match=r"did not answer within 0\.2 s") as caught:
            endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
        never.set()
        assert len(server.bodies) == 1  # the server may still be at work: no second request
    assert not caught.value.fatal


@pytest.mark.parametrize(
    "reply",
    [
        Response(b"<html>welcome</html>"),
        Response(b"\xff\xfe\x00"),
        Response([1, 2]),
        Response({}),
        Response({"choices": []}),
        Response({"choices": ["text"]}),
        Response({"choices": [{"message": {"content": 42}}]}),
        Response({"choices": [{"message": 3}]}),
        Response({"choices": [{"message": {"content": None}}]}),
        Response({"choices": [{"message": {"content": "x", "reasoning_content": ["y"]}}]}),
        chat_reply("partly", finish="content_filter"),
    ],
)
def test_rubbish_is_an_error_of_its_sample(reply: Response) -> None:
    with pytest.raises(ModelError) as caught:
        ask(reply)
    assert not caught.value.fatal and not isinstance(caught.value, TooLongError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("status", [401, 403, 402, 404, 302])
def test_what_no_later_sample_can_mend_is_fatal(status: int) -> None:
    with serving(answering(error(status, "bad key sk-secret", Location="/elsewhere"))) as server:
        waits: list[float] = []
        endpoint = opened(server.url, waits, key="sk-secret")
        with pytest.raises(ModelError) as caught:
            endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
    assert caught.value.fatal and caught.value.hint and not waits
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"),  # vLLM, OpenAI
        (400, "Requested token count exceeds the model's maximum context length of 4096 tokens."),  # SGLang
        (400, "the request exceeds the available context size. try increasing the context size"),  # llama.cpp
        (500, "context_length_exceeded"),
        (422, "prompt is too long: 5000 tokens > 4096 maximum"),
        (413, "Payload Too Large"),
    ],
)
def test_a_prompt_that_does_not_fit(status: int, words: str) -> None:
    with pytest.raises(TooLongError):
        ask(error(status, words))


@pytest.mark.parametrize(
    "body", [{"detail": "bad field"}, {"message": "bad field"}, {"error": "bad field"}, b"bad field"]
)
def test_other_refusals_carry_the_servers_words(body: Any) -> None:
    with pytest.raises(ModelError, match="answers 400: bad field") as caught:
        ask(Response(body, 400))
    assert not caught.value.fatal and "--endpoint-body" in caught.value.hint


def test_a_busy_server_is_asked_again() -> None:
    replies = [error(429, "slow down", **{"Retry-After": "7"}), error(503, "loading"), chat_reply("late")]
    with serving(answering(lambda body: replies.pop(0))) as server:
        waits: list[float] = []
        endpoint = opened(server.url, waits)
        reply = endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
    assert reply.text == "late"
    assert waits == [7, 2]


def test_a_server_that_stays_busy() -> None:
    with serving(answering(error(500, "out of order"))) as server:
        waits: list[float] = []
        endpoint = opened(server.url, waits, retries=2)
        with pytest.raises(ModelError, match="answers 500: out of order") as caught:
            endpoint.read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
        assert len(server.bodies) == 3
    assert not caught.value.fatal and waits == [1, 2]


def test_an_empty_account_is_not_asked_again() -> None:
    with serving(answering(error(429, "insufficient_quota"))) as server:
        waits: list[float] = []
        with pytest.raises(ModelError) as caught:
            opened(server.url, waits).read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS)
    assert caught.value.fatal and not waits


def test_a_connection_that_breaks_is_tried_again() -> None:
    replies = [Response(status=None), chat_reply("back")]
    with serving(answering(lambda body: replies.pop(0))) as server:
        assert opened(server.url, []).read(Prompt(ids("x")), SETTINGS).ask((), SETTINGS).text == "back"


# -- log-probabilities


def scored(logprobs: Any, prompt: str = "The sky ", continuation: str = "is", chat: bool = False) -> Any:
    choice = {"text": "", "finish_reason": "length", "logprobs": logprobs}
    with serving(answering(Response({"choices": [choice]}))) as server:
        endpoint = Endpoint.open(server.url, KNOWN)
        found = endpoint.read(Prompt(ids(prompt), chat=chat), SETTINGS).score((), ids(continuation))
        return found, server.bodies[0]


def tokens(text: str, tops: list[Any], extra: int = 1) -> dict[str, Any]:
    count = len(text) + extra
    values = [None, *(-float(i) for i in range(1, count))]
    return {
        "tokens": [*text, *"!" * extra],
        "token_logprobs": values,
        "top_logprobs": [None] * (count - len(tops)) + tops,
    }


@pytest.mark.parametrize("extra", [0, 1])
def test_a_continuation_is_scored(extra: int) -> None:
    tops = [{"i": -8.0}, {"s": -9.0, "x": -9.5}, *[{"!": -1.0}] * extra]
    score, body = scored(tokens("The sky is", tops, extra))
    assert (score.logprob, score.greedy, score.tokens) == (-17.0, True, 2)
    assert body["prompt"] == "The sky is" and body["echo"] is True and body["logprobs"] == 1


def test_a_continuation_that_is_not_the_likeliest() -> None:
    score, _ = scored(tokens("The sky is", [{"i": -8.0}, {"x": -0.5, "s": -9.0}, {"!": -1.0}]))
    assert not score.greedy


def test_another_tokenizer_is_noticed() -> None:
    with pytest.raises(ModelError, match="other tokens"):
        scored({"tokens": ["The", " sky", " is", "!"], "token_logprobs": [None, -1, -1, -1], "top_logprobs": [{}] * 4})


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"token_logprobs": [1]}, {"tokens": ["a"], "token_logprobs": [], "top_logprobs": []}]
)
def test_a_server_without_log_probabilities(logprobs: Any) -> None:
    with pytest.raises(UnsupportedError):
        scored(logprobs)


def test_the_first_token_of_a_text_has_none() -> None:
    with pytest.raises(UnsupportedError):
        scored(tokens("is", [{"i": -1.0}, {"s": -1.0}, {"!": -1.0}]), prompt="")


def test_chats_are_not_scored() -> None:
    with pytest.raises(UnsupportedError):
        scored(None, chat=True)


def test_the_served_model_scores_as_itself() -> None:
    model = ScriptedModel(likely=lambda prompt, text: (-len(prompt) - len(text) / 2, "s" in text))
    with serving(Served(model)) as server:
        endpoint = Endpoint.open(server.url, model)
        score = endpoint.read(Prompt(ids("The "), chat=False), SETTINGS).score(ids("sky "), ids("is"))
    assert score.logprob == sum(-len("The sky i"[:place]) - 0.5 for place in (8, 9))
    assert not score.greedy  # "i" is not
