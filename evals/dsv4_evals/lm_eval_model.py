"""The Protocol's model as lm-eval sees one: a TemplateLM that reads each context once and keeps every answer at once.

Owns the translation of requests and settings, and the journal that a killed run goes on from.  Nothing is truncated:
what does not fit is "too long".  Knows no tasks and no scores (lm_eval_run.py); importing it needs lm-eval.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from .errors import EvalError, ModelError, RunError, TooLongError
from .lm_eval_requests import Asked, build, grouped, read_context, write_messages
from .model import Context, Ids, Model, Prompt, Settings, Turn

Progress = Callable[[int, int], None]
Line = dict[str, Any]
_SCORING = Settings(max_tokens=1)
_NOTHING_SPENT: Line = {
    "prompt_tokens": 0,
    "cached_tokens": 0,
    "completion_tokens": 0,
    "cost": None,
    "seconds": {"context": 0.0, "prefill": 0.0, "decode": 0.0},
}
_DEFAULT_ANSWER = 256  # lm-eval's own, for tasks that do not say


@dataclass(frozen=True)
class LmDrawing:
    """How answers are drawn, over what each task says itself.

    max_tokens: the most for thinking and answer together, by default what the task allows for the answer and
    ``thinking_tokens``.  temperature None: the task's own (greedy unless it samples).  seed: of drawn answers; the n-th
    repetition of a request draws with seed + n.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    thinking: Literal["none", "high", "max"] = "none"
    thinking_tokens: int = 0

    def settings(self, wanted: Mapping[str, Any], repetition: int) -> tuple[Settings, int]:
        """For lm-eval's gen_kwargs: the settings, and the tokens that the answer itself may have."""
        kwargs: Mapping[str, Any] = normalize_gen_kwargs(dict(wanted), _DEFAULT_ANSWER)
        answer = min(int(kwargs["max_gen_toks"]), self.max_tokens or int(kwargs["max_gen_toks"]))
        if answer < 1:
            raise EvalError(f"the task asks for answers of {answer} tokens", "Correct max_gen_toks in its file.")
        own = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        temperature = own if self.temperature is None else self.temperature
        both = answer + (self.thinking_tokens if self.thinking != "none" else 0)
        settings = Settings(
            max_tokens=min(both, self.max_tokens or both),
            temperature=temperature,
            top_p=float(kwargs.get("top_p") or self.top_p),
            seed=self.seed + repetition,
            thinking=self.thinking,
            stop=tuple(text for text in kwargs["until"] if text),
        )
        return settings, answer


class Journal:
    """Answers by request, in a file that grows by whole lines; a torn last line (a kill) is cut off when it is opened.

    Keys hold what was asked, not who was asked: one journal serves one model (the run's identity sees to that).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, Line] = {}
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, raw in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(raw)
                self._lines[line["key"]] = line
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}, line {number} is damaged", "Remove that line to ask it again.") from None

    def get(self, key: str) -> Line | None:
        """The line of a request that was answered; what failed or did not fit is asked again."""
        line = self._lines.get(key)
        return line if line is not None and line["status"] in ("ok", "no_answer") else None

    def add(self, line: Line) -> None:
        self._lines[line["key"]] = line
        with self._path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


class ProtocolLM(TemplateLM):
    """A Model for lm-eval's tasks.

    ctx: the most tokens a request may have, by default the model's.
    chat: contexts are conversations in the model's template (lm-eval's apply_chat_template), else plain text behind
    the model's begin of sentence.  Log-probabilities are always taken without thinking.
    lines: one for every request so far, as the journal has them; whoever runs several evaluations clears it between.
    """

    def __init__(
        self,
        model: Model,
        drawing: LmDrawing,
        *,
        chat: bool = True,
        ctx: int | None = None,
        journal: Journal | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.model, self.drawing, self.chat = model, drawing, chat
        self.ctx = model.ctx if ctx is None else min(ctx, model.ctx)
        self.lines: list[Line] = []
        self._journal, self._progress = journal, progress

    # -- what lm-eval asks of a model

    @property
    def eot_token_id(self) -> int:
        # lm-eval conditions on it where there is no context; the Protocol's models put their own beginning there.
        raise NotImplementedError("the model puts its own begin of sentence")

    @property
    def max_length(self) -> int:
        return self.ctx

    @property
    def max_gen_toks(self) -> int:
        return _DEFAULT_ANSWER

    @property
    def tokenizer_name(self) -> str:
        return self.model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of plain text; special tokens are never added, and never read from it."""
        return self.model.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in a text form of our own; the model renders it when asked."""
        return write_messages(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return f"{self.model.name}'s own" if self.chat else ""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, in the requests' order; "" for what was not answered (see `lines`)."""
        asked = [read_context(request.args[0], self.chat) for request in requests]
        thinking = self.drawing.thinking != "none"
        if thinking and not all(one.chat for one in asked):
            raise EvalError("thinking needs the chat template", "Leave out --no-chat or --think.")
        keys = _keys("generate_until", requests)
        plans = [self.drawing.settings(request.args[1], n) for request, (_, n) in zip(requests, keys, strict=True)]
        # With thinking the answer begins behind it: an opening given before would end it.
        openings = [() if thinking else tuple(self.model.encode(one.opening)) for one in asked]

        def answer(place: int, context: Context, rest: Ids, first: bool, left: int) -> Line:
            settings, most = plans[place]
            settings = replace(settings, max_tokens=min(settings.max_tokens, most + left))
            reply = context.ask(rest, settings, openings[place])
            text = reply.text
            if thinking:  # what the thinking left over is not the answer's
                ids = self.model.encode(text)
                text = text if len(ids) <= most else self.model.decode(ids[:most])
            return {
                "status": "ok" if text.strip() and reply.finish != "length_thinking" else "no_answer",
                "answer": text,
                "reasoning": reply.reasoning,
                "finish": reply.finish,
                "max_tokens": settings.max_tokens,
                **self._spent(reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens),
                "seconds": {"prefill": reply.prefill_s, "decode": reply.decode_s},
                "kv_bytes": reply.kv_bytes,
            }

        needed = [len(opening) + plan[1] for opening, plan in zip(openings, plans, strict=True)]
        settings = plans[0][0] if plans else _SCORING
        lines = self._run("generate_until", requests, keys, asked, settings, needed, answer)
        return [line["answer"] for line in lines]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Natural log-probability of each continuation, and whether greedy decoding would give it.

        Raises EvalError before anything is computed when one of them does not fit: there is no score to give it.
        """
        asked, openings, continuations, needed = [], [], [], []
        count = lru_cache(maxsize=64)(lambda text: len(self.model.encode(text)))
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise EvalError(f"{_where(request)} has an empty continuation to score", "Correct the task's file.")
            one = read_context(context, self.chat)
            before = one.opening if one.chat else one.text
            head, scored = self._encode_pair(before, continuation) if before else ([], self.tok_encode(continuation))
            if one.chat:
                asked.append(one)
                openings.append(tuple(head))
                inside = len(head) + count(one.text) + sum(count(text) for _, text in one.turns)
            else:  # the spaces at a context's end are now the continuation's, as everywhere in lm-eval
                asked.append(Asked(one.text.rstrip()))
                openings.append(())
                inside = len(head)
            continuations.append(tuple(scored))
            needed.append(len(openings[-1]) + len(scored))
            total = inside + len(scored) + self._overhead(asked[-1])
            if total > self.ctx:
                raise EvalError(
                    f"{_where(request)} has {total:,} tokens and the context holds {self.ctx:,}",
                    "Give a larger --ctx, or leave the task out: it scores given answers, and nothing is cut to fit.",
                )

        def answer(place: int, context: Context, rest: Ids, first: bool, left: int) -> Line:
            score = context.score(rest, continuations[place], openings[place])
            prompt = context.tokens + len(rest) + len(openings[place])
            return {
                "status": "ok",
                "logprob": score.logprob,
                "greedy": score.greedy,
                **self._spent(prompt, context.cached_tokens if first else context.tokens, score.tokens),
                "seconds": {"prefill": 0.0, "decode": 0.0},
            }

        keys = _keys("loglikelihood", requests)
        lines = self._run("loglikelihood", requests, keys, asked, _SCORING, needed, answer)
        return [(line["logprob"], line["greedy"]) for line in lines]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text; where it is longer than the context, in windows as lm-eval cuts them."""
        beginning = self.model.overhead(Prompt((), chat=False), _SCORING)
        size = self.ctx - beginning - 1
        keys = _keys("loglikelihood_rolling", requests)
        results = []
        for place, (request, (key, _)) in enumerate(zip(requests, keys, strict=True)):
            line = self._journal.get(key) if self._journal else None
            if line is None:
                ids = self.model.encode(request.args[0])
                logprob = seconds = 0.0
                for window in get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=size, context_len=1):
                    given, scored = make_disjoint_window(window)
                    # The first window's prefix is the model's own beginning.
                    context = self.model.read(Prompt([token for token in given if token >= 0], chat=False), _SCORING)
                    logprob += context.score((), scored).logprob
                    seconds += context.prefill_s
                line = {
                    "key": key,
                    **_names("loglikelihood_rolling", request),
                    "status": "ok",
                    "logprob": logprob,
                    **self._spent(beginning, 0, len(ids)),
                    "seconds": {"context": seconds, "prefill": 0.0, "decode": 0.0},
                }
                self._keep(line, "loglikelihood_rolling", request)
            self.lines.append({**line, **_names("loglikelihood_rolling", request)})
            results.append(line["logprob"])
            self._progress(place + 1, len(requests))
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same for ids: plain prompts, one by one."""
        results = []
        for _, given, continuation in requests:
            score = self.model.read(Prompt(tuple(given), chat=False), _SCORING).score((), continuation)
            results.append((score.logprob, score.greedy))
        return results

    # -- one pass over requests

    def _run(
        self,
        method: str,
        requests: Sequence[Any],
        keys: Sequence[tuple[str, int]],
        asked: Sequence[Asked],
        settings: Settings,
        needed: Sequence[int],
        answer: Callable[[int, Context, Ids, bool, int], Line],
    ) -> list[Line]:
        """A line for every request; each common beginning is read once.

        needed: tokens of opening and answer, by place.  answer: asks or scores one; told its place, its context, what
        follows that, whether it is the first behind it, and how many tokens the context has left beside ``needed``.

        Groups are formed over all requests, answered or not, so that a resumed run splits its prompts as before.
        Raises a fatal ModelError at once, and one for the failed requests at the end: there is nothing to score.
        """
        journal = self._journal
        lines: list[Line | None] = [journal.get(key) if journal else None for key, _ in keys]
        done = sum(line is not None for line in lines)
        self._progress(done, len(requests))
        for places in grouped(asked):
            if all(lines[place] is not None for place in places):
                continue
            group = build(asked, places, self.model.encode)
            fixed = sum(len(turn.ids) for turn in group.prompt.turns) + self.model.overhead(group.prompt, settings)
            context: Context | None = None
            for place, rest in zip(group.places, group.rests, strict=True):
                if lines[place] is not None:
                    continue
                line: Line = {"key": keys[place][0], **_names(method, requests[place])}
                tokens = fixed + len(group.prompt.ids) + len(rest) + needed[place]
                seconds = 0.0
                try:
                    if tokens > self.ctx:
                        raise TooLongError(f"{tokens:,} tokens do not fit the context of {self.ctx:,}")
                    first = context is None
                    if context is None:
                        context = self.model.read(group.prompt, settings)
                        seconds = context.prefill_s
                    line |= answer(place, context, rest, first, self.ctx - tokens)
                    line["seconds"]["context"] = seconds
                except ModelError as error:
                    if error.fatal:
                        raise
                    status = "too_long" if isinstance(error, TooLongError) else "error"
                    line |= {"status": status, "answer": "", "message": str(error), **_NOTHING_SPENT}
                    line["prompt_tokens"] = tokens - needed[place]
                self._keep(line, method, requests[place])
                lines[place] = line
                done += 1
                self._progress(done, len(requests))
        # The same request of another task has been answered under that one's name.
        named = [{**(line or {}), **_names(method, request)} for line, request in zip(lines, requests, strict=True)]
        self.lines += named
        unscorable = ("error",) if method == "generate_until" else ("error", "too_long")
        failed = [line for line in named if line["status"] in unscorable]
        if failed:
            first_one = f"{failed[0]['task']}, document {failed[0]['doc']}: {failed[0]['message']}"
            raise ModelError(
                f"{len(failed)} of {len(requests)} requests failed; the first, {first_one}",
                "The same command again asks only these.",
            )
        return named

    def _overhead(self, one: Asked) -> int:
        return self.model.overhead(Prompt((), tuple(Turn(role, ()) for role, _ in one.turns), one.chat), _SCORING)

    def _keep(self, line: Line, method: str, request: Any) -> None:
        if self._journal:
            self._journal.add(line)
        if line["status"] == "ok":
            result = line["answer"] if method == "generate_until" else line["logprob"]
            self.cache_hook.add_partial(
                method, request.args, (result, line["greedy"]) if method == "loglikelihood" else result
            )

    def _spent(self, prompt: int, cached: int, completion: int) -> Line:
        cost = self.model.cost(prompt, completion)
        tokens = {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": completion}
        return {**tokens, "cost": None if cost is None else asdict(cost)}


def _keys(method: str, requests: Sequence[Any]) -> list[tuple[str, int]]:
    """What each request is known by, and how often the same one came before it (repeats of one document)."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        asked = json.dumps([method, *request.args], sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(asked, digest_size=16).hexdigest()
        keys.append((f"{digest}-{seen[digest]}", seen[digest]))
        seen[digest] += 1
    return keys


def _names(method: str, request: Any) -> Line:
    return {"method": method, "task": request.task_name, "doc": request.doc_id, "request": request.idx}


def _where(request: Any) -> str:
    return f"document {request.doc_id} of {request.task_name}"
