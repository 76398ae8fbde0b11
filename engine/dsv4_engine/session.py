"""One growing token sequence over a model: extend it, fork it, go back.

Owns the tokens, the chunking and the promise that an interrupted call leaves the sequence as it was after its last
whole chunk.  Knows no text and no file, and prints nothing.

Chunks end on multiples of the engine's chunk size: the grid.  Every bit of a session's state follows from its tokens
and its `cuts`, the places off the grid where a forward pass ended.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .device_sampling import Draw
from .errors import PromptError
from .model import Model
from .state import SequenceState

if TYPE_CHECKING:
    from .lanes import Lanes
    from .token_step import Floats, TokenStep

Progress = Callable[[int, int], None]
FEW_TOKENS = 8
LOGIT_ROWS = 1024  # of "all" logits, held on the device at a time


class Session:
    """Made by `Engine.session`; ``tokens`` are the ids taken in so far, ``cuts`` as above, rising.

    on_chunk(session) is called after every chunk that leaves the session without cuts; forks do not inherit it.
    """

    def __init__(
        self,
        model: Model,
        state: SequenceState,
        tokens: list[int],
        ctx: int,
        chunk: int,
        step: TokenStep | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """step: runs single tokens of a model so small that a few tokens are too little to share among threads.

        lanes: runs chunks of one so small that a chunk is.
        """
        self._model, self._state, self._chunk, self._step, self._lanes = model, state, chunk, step, lanes
        self.tokens, self.ctx = tokens, ctx
        self.cuts: list[int] = []
        self.on_chunk: Callable[[Session], None] | None = None
        self._whole = state.mark()  # where the last chunk without cuts ended

    @property
    def position(self) -> int:
        """How many tokens the sequence holds."""
        return len(self.tokens)

    @property
    def whole(self) -> int:
        """How many of the first tokens came in whole chunks: what they left behind is the same, bit for bit, in every
        session that begins with them."""
        return self._whole.position

    @property
    def state(self) -> SequenceState:
        """What the model remembers; only to be read."""
        return self._state

    @property
    def kv_bytes(self) -> int:
        """Bytes of state held: compressed rows, windows and unfinished blocks."""
        return self._state.nbytes

    def extend(
        self,
        token_ids: Sequence[int],
        logits: Literal["last", "all", "none", "device"] = "last",
        progress: Progress | None = None,
    ) -> Tensor:
        """Append tokens.  Returns float32 logits: [V] after the last one, [len, V] for "all", [0] for "none".

        They lie on the host, whatever the device, but for "device": those after the last token where the model makes
        them, at once, so that a GPU is at work while the caller goes on; `sampling.sample` takes them.
        Any split of a sequence over calls gives the same logits up to float32 rounding.  Chunks end on multiples of
        the engine's chunk size, counted from the start of the sequence, so a split at such a multiple changes nothing.
        progress(done, total) is called after every chunk.  Raises PromptError for ids outside the vocabulary, no ids,
        or more than the context holds; nothing is taken in then.
        """
        if self._step is not None and len(token_ids) == 1:
            return self._extend_by_one(int(token_ids[0]), logits, progress)
        with torch.inference_mode():
            return self._extend_by_chunks(self._checked(token_ids), logits, progress)

    def _extend_by_chunks(self, ids: Tensor, logits: str, progress: Progress | None) -> Tensor:
        parts = []
        done = 0
        with closing(self._advanced(ids)) as advanced:
            for part, streams in advanced:
                self._took(part.tolist())
                done += len(part)
                if logits == "all":
                    parts += [self._logits(some) for some in streams.split(LOGIT_ROWS)]
                elif logits in ("last", "device") and done == len(ids):
                    parts.append(self._logits(streams[-1:], there=logits == "device")[0])
                else:
                    # So progress, times and Ctrl-C follow the work and not its queue (by a chunk, until the last).
                    self._model.wait(done == len(ids))
                if progress is not None:
                    progress(done, len(ids))
        if logits == "none":
            return torch.empty(0)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.inference_mode()
    def ahead(self, draw: Draw) -> None:
        """Begin with a token that is being drawn: where `extend` is given this one next, the work is under way.

        Nothing else changes, whatever comes next; a model that cannot do it does nothing.
        """
        if self.position < self.ctx:
            self._model.ahead(draw, self._state)

    def _extend_by_one(self, token: int, logits: str, progress: Progress | None) -> Tensor:
        """`extend` by one token of a small model, where a few operations on tensors, or entering a mode, are felt."""
        assert self._step is not None
        self._check(token, token, 1)
        streams_JD = self._step_by(token)
        self._took([token])
        result = torch.empty(0) if logits == "none" else torch.from_numpy(self._step.logits(streams_JD))
        if progress is not None:
            progress(1, 1)
        return result[None] if logits == "all" else result

    def retrace(self, tokens: Sequence[int], cuts: Sequence[int], progress: Progress | None = None) -> None:
        """Become what a session is that holds ``tokens`` and was cut at ``cuts``, of which this one holds a beginning.

        Afterwards it goes on bit for bit as that one did.
        """
        start = self.position
        assert self.tokens == list(tokens[:start]) and self.cuts == [cut for cut in cuts if cut <= start]

        def advanced(done: int, total: int) -> None:
            if progress is not None:
                progress(self.position - start, len(tokens) - start)

        for end in [*(cut for cut in cuts if cut > start), len(tokens)]:
            if end > self.position:
                self.extend(tokens[self.position : end], logits="none", progress=advanced)

    def fork(self) -> Session:
        """A session with the same past that grows apart; the past's compressed rows are shared, not copied."""
        return self._with(self.tokens, self.cuts, self._state.fork(), self._whole)

    def fork_to_watch(self) -> Session:
        """A fork that runs through the model's modules alone, in this thread, where they can be watched from outside.

        Slower, and alike up to float32 rounding.
        """
        fork = self.fork()
        fork._step, fork._lanes, fork._state.watched = None, None, True
        return fork

    def fork_whole(self) -> Session:
        """A fork that goes back to `whole`."""
        whole = self._whole.fork()
        return self._with(self.tokens[: self.whole], [], whole, whole.mark())

    def holding(self, tokens: Sequence[int], state: SequenceState) -> Session:
        """A session of the same model that holds ``tokens`` in whole chunks, which left ``state`` behind."""
        assert len(tokens) == state.position and state.position % self._chunk == 0
        return self._with(tokens, [], state, state.mark())

    def _with(self, tokens: Sequence[int], cuts: Sequence[int], state: SequenceState, whole: SequenceState) -> Session:
        other = Session(self._model, state, list(tokens), self.ctx, self._chunk, self._step, self._lanes)
        other.cuts, other._whole = list(cuts), whole
        return other

    def _took(self, part: list[int]) -> None:
        self.tokens.extend(part)
        if self.position % self._chunk:
            self.cuts.append(self.position)
        elif not self.cuts:
            self._whole = self._state.mark()
            if self.on_chunk is not None:
                self.on_chunk(self)

    def _advanced(self, ids: Tensor) -> Generator[tuple[Tensor, Tensor]]:
        """Token ids [S] chunk by chunk, each with its streams [S, J, D]; this session's state stands after it then."""
        grid = -self.position % self._chunk  # tokens up to it
        parts = [part for part in (ids[:grid], *ids[grid:].split(self._chunk)) if len(part)]
        # Whole chunks, and always these, go side by side, so that their bits do not depend on how many came together.
        for whole, group in groupby(parts, lambda part: len(part) == self._chunk):
            some = list(group)
            if whole and self._lanes is not None:
                with closing(self._lanes.run(some, self._state)) as found:
                    yield from zip(some, found, strict=True)
            else:
                for part in some:
                    yield part, self._advance(part)

    def _advance(self, part: Tensor) -> Tensor:
        """Token ids [S] -> their streams [S, J, D]."""
        if self._step is not None and len(part) == 1:
            return torch.from_numpy(self._step_by(int(part[0])))[None]
        self._state.save()
        threads = torch.get_num_threads()
        if self._step is not None and len(part) <= FEW_TOKENS:
            torch.set_num_threads(1)
        try:
            return self._model.forward(part, self._state)
        except BaseException:  # also Ctrl-C: half-advanced layers must not be continued from
            self._state.restore()
            raise
        finally:
            torch.set_num_threads(threads)

    def _step_by(self, token: int) -> Floats:
        """`_advance` by one token of a small model: its streams [J, D]."""
        assert self._step is not None
        self._state.save()
        try:
            return self._step.forward(token, self._state)
        except BaseException:
            self._state.restore()
            raise

    def _logits(self, streams: Tensor, there: bool = False) -> Tensor:
        if self._step is not None and streams.shape[0] == 1:
            return torch.from_numpy(self._step.logits(streams[0].numpy()))[None]
        logits = self._model.logits(streams)
        if there or not logits.is_cuda or logits.shape[0] > 1:
            return logits if there else logits.cpu()
        # Pinned memory, which torch keeps for the next time, takes a row in a tenth of the time.
        out = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        out.copy_(logits, non_blocking=True)
        torch.cuda.current_stream(logits.device).synchronize()
        return out

    def _checked(self, token_ids: Sequence[int]) -> Tensor:
        if len(token_ids) == 0:
            raise PromptError("there are no tokens to extend the sequence with", "Give at least one token.")
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu")
        self._check(int(ids.min()), int(ids.max()), len(ids))
        return ids

    def _check(self, low: int, high: int, count: int) -> None:
        """Whether ``count`` ids from ``low`` to ``high`` may follow."""
        vocab = self._model.config.vocab_size
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise PromptError(
                f"token id {bad} is outside the model's vocabulary 0 to {vocab - 1}", "Use this model's own tokenizer."
            )
        if self.position + count > self.ctx:
            raise PromptError(
                f"{self.position + count:,} tokens do not fit the context of {self.ctx:,}",
                "Shorten the input, or raise the context if the model allows it.",
            )
