"""Models for evaluations: the local engine behind dsv4_evals' Protocol, or an endpoint with the local tokenizer.

The only place where the engine and the evaluations meet.  Loads nothing until a model is opened.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv4_evals.errors import TooLongError
from dsv4_evals.model import Cost, Ids, Model, Progress, Prompt, Reply, Score, Settings, Trace
from dsv4cli.options import ANYWHERE, Placed
from dsv4cli.output import note
from dsv4cli.tracing import Tracer

if TYPE_CHECKING:
    from torch import Tensor

    from dsv4_engine import Engine, Session
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.indexer import Indexer
    from dsv4_engine.prefix_cache.cache import PrefixCache
    from dsv4_engine.tokenizer import Tokenizer

KEY_ENV = "DSV4_API_KEY"
_SCORED_AT_ONCE = 128  # logits of so many tokens are held together; a vocabulary of 129,280 makes that 66 MB
_MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a content of token ids while the template is written


@dataclass(frozen=True)
class Where:
    """Which model answers: a local one, or with ``endpoint`` a served one whose tokenizer ``model`` has.

    ctx: the longest sample and its thinking in tokens, 0 where nobody knows.  no_cache: keep no prefixes on disk.
    """

    model: str
    device: str = "cpu"
    dtype: str = "float32"
    kv_dtype: str = "mixed"
    ctx: int = 0
    endpoint: str | None = None
    endpoint_model: str | None = None
    endpoint_timeout: float = 1800.0
    endpoint_body: Mapping[str, Any] | None = None
    cache_dir: Path | None = None
    no_cache: bool = False
    placed: Placed = ANYWHERE


def open_model(where: Where) -> Model:
    """Load the model, or ask the endpoint what it serves.  Raises what the engine or the endpoint refuses."""
    if where.endpoint is not None:
        from dsv4_evals.endpoint import Endpoint

        return Endpoint.open(
            where.endpoint,
            PromptText.load(where.model),
            model=where.endpoint_model,
            key=os.environ.get(KEY_ENV),
            ctx=where.ctx or None,
            timeout_s=where.endpoint_timeout,
            body=where.endpoint_body,
        )
    from dsv4cli import answering

    engine, load_s = answering.load(
        where.model, device=where.device, dtype=where.dtype, kv_dtype=where.kv_dtype, ctx=None, placed=where.placed
    )
    text = PromptText(engine.tokenizer, engine.config, engine.kv_dtype)
    if where.no_cache:
        return LocalModel(engine, text, load_s)
    from dsv4_engine.prefix_cache import PrefixStore
    from dsv4_engine.prefix_cache.cache import PrefixCache

    store = PrefixStore.open(where.cache_dir)
    model = LocalModel(engine, text, load_s, PrefixCache(store, engine))
    weakref.finalize(model, store.close)
    return model


@dataclass(frozen=True)
class PromptText:
    """A model's tokenizer, template and costs, without its weights."""

    tokenizer: Tokenizer
    config: ModelConfig
    kv_dtype: str = "mixed"

    @classmethod
    def load(cls, model: str) -> PromptText:
        """From a checkpoint's folder, name or alias."""
        from dsv4_engine.config import ModelConfig
        from dsv4_engine.locate import resolve_model
        from dsv4_engine.tokenizer import Tokenizer

        folder = resolve_model(model)
        config = ModelConfig.from_folder(folder)
        return cls(Tokenizer.from_folder(folder, config.vocab_size), config)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, specials=False)

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids)

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        before, after = self.frame(prompt, settings)
        return len(before) + len(after) - len(prompt.ids) - sum(len(turn.ids) for turn in prompt.turns)

    def frame(self, prompt: Prompt, settings: Settings) -> tuple[list[int], list[int]]:
        """Token ids up to the end of the prompt's own, and what the template puts between a question and its answer."""
        from dsv4_engine.encoding import encode_segments

        if not prompt.chat:
            return [self.tokenizer.bos_id, *prompt.ids], []
        roles = [*(turn.role for turn in prompt.turns), "user"]
        contents = [*(turn.ids for turn in prompt.turns), prompt.ids]
        messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        thinking = settings.thinking != "none"
        effort: Literal["high", "max"] | None = None if settings.thinking == "none" else settings.thinking
        ids: list[int] = []
        end = 0
        for segment in encode_segments(messages, "thinking" if thinking else "chat", effort):
            if segment.special:
                ids.append(self.tokenizer.special_id(segment.text))
                continue
            for place, part in enumerate(_MARK.split(segment.text)):
                ids.extend(contents[int(part)] if place % 2 else self.encode(part))
                if place % 2:
                    end = len(ids)
        return ids[:end], ids[end:]

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        from dsv4_engine.costs import request_cost

        found = request_cost(self.config, prompt_tokens, completion_tokens, kv_dtype=self.kv_dtype)
        return Cost(
            kv_bytes=found.kv_bytes,
            kv_bytes_v32=found.v32_kv_bytes,
            flops=found.flops_weighted,
            flops_v32=found.v32_flops_weighted,
            flops_raw=found.flops_raw,
            flops_raw_v32=found.v32_flops_raw,
        )


@dataclass(frozen=True)
class LocalModel:
    """An engine as a `dsv4_evals.model.Model`.  cache: what was read once need not be read again, bit for bit."""

    engine: Engine
    text: PromptText
    load_s: float
    cache: PrefixCache | None = None

    @property
    def name(self) -> str:
        return self.engine.name

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, configuration and precisions."""
        return f"{self.engine.weights.fingerprint[:32]} {self.engine.dtype} {self.engine.kv_dtype}"

    @property
    def ctx(self) -> int:
        return self.engine.ctx

    def about(self) -> dict[str, Any]:
        import torch

        engine, plan = self.engine, self.engine.plan
        return {
            "model": str(engine.path),
            "device": engine.device,
            "backend": engine.backend.name,
            "dtype": engine.dtype,
            "kv_dtype": engine.kv_dtype,
            "chunk": engine.chunk,
            "threads": torch.get_num_threads(),
            "memory": {
                "weights": plan.weights + plan.unpacked,
                "working_set": plan.working_set,
                "available": plan.available,
            },
            "load_s": round(self.load_s, 3),
            **machine(),
        }

    def encode(self, text: str) -> list[int]:
        return self.text.encode(text)

    def decode(self, ids: Ids) -> str:
        return self.text.decode(ids)

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        return self.text.overhead(prompt, settings)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        return self.text.cost(prompt_tokens, completion_tokens)

    def read(self, prompt: Prompt, settings: Settings, progress: Progress | None = None) -> LocalContext:
        """Raises TooLongError when nothing could follow the prompt."""
        before, after = self.text.frame(prompt, settings)
        if len(before) + len(after) >= self.ctx:
            raise TooLongError(f"{len(before) + len(after):,} tokens leave no room in a context of {self.ctx:,}")
        # Without a template nothing need follow the prompt, and an answer can only be drawn behind a token that is fed.
        kept = 0 if after else 1
        started = time.perf_counter()
        end = len(before) - kept
        session, cached = self._begin(before[:end])
        start = session.position

        def advanced(done: int, total: int) -> None:
            if progress is not None:
                progress(start + done, start + total)

        advanced(0, end - start)
        if start < end:
            session.extend(before[start:end], logits="none", progress=advanced)
        while self.cache is not None and self.cache.store.notices:
            note(f"note: {self.cache.store.notices.pop(0)}", style="dim")
        return LocalContext(self, session, before[end:], after, len(before), time.perf_counter() - started, cached)

    def _begin(self, ids: Sequence[int]) -> tuple[Session, int]:
        """A session that holds a beginning of ``ids``, and how many of them were not computed for it."""
        if self.cache is None or not ids:
            return self.engine.session(), 0
        session, reuse = self.cache.start(ids)
        return session, reuse.tokens

    @cached_property
    def indexers(self) -> dict[int, Indexer]:
        """The indexers by layer."""
        found = {i: block.attn.indexer for i, block in enumerate(self.engine.model.blocks)}
        return {i: indexer for i, indexer in found.items() if indexer is not None}


class LocalContext:
    """A read prompt as a `dsv4_evals.model.Context`; `Watched` as well."""

    def __init__(
        self,
        model: LocalModel,
        session: Session,
        last: list[int],
        after: list[int],
        tokens: int,
        prefill_s: float,
        cached: int,
    ) -> None:
        """last: tokens of the prompt that each question feeds again; after: the template's, behind each question."""
        self._model, self._session, self._last, self._after = model, session, last, after
        self.tokens, self.prefill_s, self.cached_tokens = tokens, prefill_s, cached
        self._asked = False

    def ask(self, ids: Ids, settings: Settings, opening: Ids = ()) -> Reply:
        session = self._session.fork()
        return self._reply(session, session, ids, settings, opening)

    def ask_watched(self, ids: Ids, settings: Settings, opening: Ids = (), steps: int = 64) -> tuple[Reply, Trace]:
        session = self._session.fork_to_watch()
        with Tracer.over(session, self._model.indexers, steps + 1) as tracer:
            reply = self._reply(session, tracer, ids, settings, opening)
        return reply, tracer.trace(reply.prompt_tokens - 1, self._model.engine.config)

    def score(self, ids: Ids, continuation: Ids, opening: Ids = ()) -> Score:
        """The continuation stands where an answer would: behind the template's opening of it where there is one."""
        if not continuation:
            raise ValueError("there is no continuation to score")
        session = self._session.fork()
        logits = session.extend([*self._last, *ids, *self._after, *opening])[None]
        logprob, greedy = 0.0, True
        for start in range(0, len(continuation), _SCORED_AT_ONCE):
            part = list(continuation[start : start + _SCORED_AT_ONCE])
            if len(part) > 1:
                import torch

                logits = torch.cat([logits, session.extend(part[:-1], logits="all")])
            found, likeliest = _scored(logits, part)
            logprob, greedy = logprob + found, greedy and likeliest
            if start + len(part) < len(continuation):
                logits = session.extend(part[-1:])[None]
        return Score(logprob, greedy, len(continuation))

    def _reply(
        self, session: Session, drawn_from: Session | Tracer, ids: Ids, settings: Settings, opening: Ids
    ) -> Reply:
        from dsv4_engine.generate import generate
        from dsv4_engine.sampling import Sampling

        thinking = bool(self._after) and settings.thinking != "none"
        assert not (thinking and opening), "an answer that is thought about first cannot be opened"
        generation = generate(
            drawn_from,
            [*self._last, *ids, *self._after, *opening],
            self._model.engine.tokenizer,
            Sampling(settings.temperature, settings.top_p, seed=settings.seed),
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            thinking=thinking,
        )
        for _ in generation:
            pass
        done = generation.done
        assert done is not None and done.reason != "cancelled"
        cached = self.tokens - len(self._last) if self._asked else self.cached_tokens
        self._asked = True
        return Reply(
            text=done.parsed.content,
            reasoning=done.parsed.reasoning,
            finish=done.reason,
            prompt_tokens=done.usage.prompt_tokens,
            cached_tokens=cached,
            completion_tokens=done.usage.completion_tokens,
            prefill_s=done.timing.prefill_s,
            decode_s=done.timing.decode_s,
            kv_bytes=session.kv_bytes,
        )


def _scored(logits_SV: Tensor, ids: Sequence[int]) -> tuple[float, bool]:
    """Summed log-probability of ``ids`` under these logits, and whether each is the likeliest."""
    import torch

    wanted = torch.tensor(list(ids))
    chosen = logits_SV.gather(1, wanted[:, None])[:, 0]
    logprob = (chosen - logits_SV.logsumexp(-1)).double().sum()
    return float(logprob), bool((logits_SV.argmax(-1) == wanted).all())


def machine() -> dict[str, Any]:
    """The machine and the versions, for the record of a run."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("dsv4", "torch", "tokenizers", "numpy")},
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
