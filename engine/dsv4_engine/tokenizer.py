"""Text to token ids and back, through the `tokenizers` library and a checkpoint's tokenizer.json.

Owns: reading and checking the file, the encoding of trusted markup against untrusted text, and the incremental
decoder.  Knows nothing of messages, models or sessions.

A tokenizer of this family is a byte-level BPE: a token is a run of bytes, and a character may lie across several
tokens.  Two readings of a text exist: with the added tokens recognised (markup) and without (whatever a user wrote).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from .errors import PromptError, TokenizerError
from .protocol import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

# Without these no chat can be written or read; the tokens of tools, tasks and reminders are asked for at their use.
REQUIRED_SPECIALS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

# Characters handed to the library at once.  It keeps several objects a token while it works: 10 MB at once need
# 1.2 GB and take half as long again as the same text in pieces.
_PIECE = 1 << 18

# Where a text may be cut without changing its tokens: every pre-tokenizer in use ends a word there (checked at load).
_CUT = re.compile(r"(?<=\S)\n(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")

_HINT_FILE = "Copy tokenizer.json of the model into the folder, or download the checkpoint again."
_HINT_VOCAB = "Use the tokenizer.json that was published with this checkpoint."


class TextSegment(Protocol):
    """A piece of a prompt: `special` says whether the text is one special token, or text to be read literally."""

    @property
    def text(self) -> str: ...
    @property
    def special(self) -> bool: ...


def _byte_of_char() -> dict[str, int]:
    """The printable stand-in for each byte in a byte-level vocabulary (GPT-2's table): 256 characters to bytes.

    Bytes that print in Latin-1 stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _token_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for; one that is no byte-level string stands for its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


class Decoder:
    """Turns a growing sequence of ids into text, in time linear in its length.

    `push` returns the characters that are complete; bytes that do not yet make one are kept.  Bytes that can never
    make one come out as U+FFFD at once, and `finish` does the same with an incomplete character at the end, so that
    the concatenation of everything returned equals `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes.  Raises PromptError for an id outside the vocabulary."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip))

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, else "".  The decoder starts afresh afterwards."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """A checkpoint's tokenizer.

    `vocab_size` is the number of ids (the largest id + 1, which may be below the model's rows where those are
    padded); `bos_id` and `eos_id` are those of the chat protocol's begin and end of sentence.
    """

    def __init__(self, definition: str, vocab_size: int | None = None, source: str = "tokenizer.json") -> None:
        """`definition`: the text of a tokenizer.json.  `vocab_size`: the model's rows, None where there is no model.

        Raises TokenizerError if it cannot be read, lacks a token of the chat protocol, or belongs to another
        vocabulary: more ids than the model has rows, or so few that padding cannot explain it.
        """
        self._source = source
        self._definition = definition
        self._markup = _build(definition, source)
        self._literal: tokenizers.Tokenizer | None = None
        added = self._markup.get_added_tokens_decoder()
        self._added = {token.content: token_id for token_id, token in added.items() if token.content}
        # The beginnings of the added tokens.  Thousands of whole ones would make each "<" of a long text expensive,
        # and taking a text for one that spells an added token costs nothing but the building of the second model.
        self._beginnings = re.compile("|".join(sorted({re.escape(text[:3]) for text in self._added})))
        self._bytes = self._byte_table()
        self._special_ids = frozenset(self._added.values())
        self._cuts = self._may_be_cut()
        self.vocab_size = len(self._bytes)
        self._check(vocab_size)
        # A model may draw one of its padding rows: that is no text, and no error.
        self._bytes += [b""] * ((vocab_size or 0) - len(self._bytes))
        self.bos_id = self.special_id(BOS)
        self.eos_id = self.special_id(EOS)

    @classmethod
    def from_folder(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Reads `path`/tokenizer.json; see __init__ for the checks.  Raises TokenizerError."""
        file = Path(path) / "tokenizer.json"
        try:
            definition = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(f"no tokenizer.json in {Path(path)}", _HINT_FILE) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}", _HINT_FILE) from error
        return cls(definition, vocab_size, str(file))

    def special_id(self, text: str) -> int:
        """The id of an added token, as "<think>".  Raises TokenizerError if the tokenizer has none of that name."""
        try:
            return self._added[text]
        except KeyError:
            raise TokenizerError(f"{self._source} has no token {text}, which the prompt needs", _HINT_VOCAB) from None

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Token ids of `text`; no token is added at its ends.

        specials=False reads the text literally: what is spelt like an added token becomes ordinary tokens.
        Raises PromptError for text that is not Unicode (lone surrogates).
        """
        model = self._markup
        if not specials and self._beginnings.search(text):
            model = self._literal_model()
        ids: list[int] = []
        for piece in self._pieces(text):
            try:
                # The batch call is the one that skips character offsets, which cost most of the memory.
                ids += model.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            except (TypeError, UnicodeError) as error:
                raise PromptError(
                    "the text holds half a surrogate pair, which is no character",
                    "Decode the input with errors='replace' before asking about it.",
                ) from error
        return ids

    def encode_segments(self, segments: Iterable[TextSegment]) -> list[int]:
        """Token ids of a prompt in segments: each special one is one token, all other text is read literally.

        Neighbouring literal segments are joined first, so that a word's tokens do not depend on the segments' ends.
        Raises TokenizerError for a special token that the tokenizer lacks.
        """
        ids: list[int] = []
        literal: list[str] = []
        for segment in segments:
            if segment.special:
                ids += self.encode("".join(literal), specials=False)
                literal.clear()
                ids.append(self.special_id(segment.text))
            else:
                literal.append(segment.text)
        return ids + self.encode("".join(literal), specials=False)

    def decode(self, ids: Sequence[int], skip_specials: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.  Raises PromptError for an id out of range."""
        return b"".join(self.token_bytes(i, skip_special=skip_specials) for i in ids).decode("utf-8", errors="replace")

    def decoder(self, skip_specials: bool = False) -> Decoder:
        """A fresh incremental decoder."""
        return Decoder(self, skip_specials)

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes of one token; b"" for an added token when those are skipped, and for an id without a token.

        Raises PromptError for an id outside the vocabulary (the model's, where its size was given).
        """
        if not 0 <= token_id < len(self._bytes):
            raise PromptError(f"token id {token_id} is outside the vocabulary of {len(self._bytes)}", _HINT_VOCAB)
        return b"" if skip_special and token_id in self._special_ids else self._bytes[token_id]

    def _check(self, rows: int | None) -> None:
        missing = [token for token in REQUIRED_SPECIALS if token not in self._added]
        if missing:
            raise TokenizerError(f"{self._source} lacks the special tokens {', '.join(missing)}", _HINT_VOCAB)
        if rows is None:
            return
        if self.vocab_size > rows:
            raise TokenizerError(
                f"{self._source} has {self.vocab_size} token ids, the model has only {rows}", _HINT_VOCAB
            )
        # Rows are padded to a round number at most; a tenth of them missing means the file is another model's.
        if rows - self.vocab_size > max(1024, rows // 10):
            raise TokenizerError(
                f"{self._source} has {self.vocab_size} token ids, the model has {rows}: it is another model's",
                _HINT_VOCAB,
            )

    def _byte_table(self) -> list[bytes]:
        """Entry i: the bytes of token i (b"" where the ids have a hole)."""
        tokens = {token_id: _token_bytes(token) for token, token_id in self._markup.get_vocab(False).items()}
        tokens |= {token_id: text.encode("utf-8") for text, token_id in self._added.items()}
        return [tokens.get(i, b"") for i in range(max(tokens, default=-1) + 1)]

    def _literal_model(self) -> tokenizers.Tokenizer:
        """The same model without its added tokens, built at first need: rarely does a text spell one of them."""
        if self._literal is None:
            definition: dict[str, Any] = json.loads(self._definition)
            definition["added_tokens"] = []
            self._literal = _build(json.dumps(definition), self._source)
        return self._literal

    def _may_be_cut(self) -> bool:
        """Whether the pre-tokenizer ends a word at the places of _CUT, seen on a text that has both kinds."""
        splitter = self._markup.pre_tokenizer
        if splitter is None:
            return False
        ends = {span[1] for _, span in splitter.pre_tokenize_str("word.\nword\nword word")}
        return {6, 11, 15} <= ends

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self._cuts and len(text) - start > _PIECE:
            cut = _CUT.search(text, start + _PIECE)
            # An added token with spaces in it, or one that eats its neighbours' spaces, must not be cut in two: none
            # of this family has letters on both sides of a space or line end, which is all that _CUT looks for.
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        if start < len(text):
            yield text[start:]


def _build(definition: str, source: str) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(definition)
        decoder = json.loads(definition).get("decoder") or {}
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise TokenizerError(f"{source} is not a readable tokenizer: {error}", _HINT_FILE) from error
    if "ByteLevel" not in json.dumps(decoder):
        raise TokenizerError(f"{source} is not a byte-level tokenizer, which this model family uses", _HINT_VOCAB)
    model.no_truncation()
    model.no_padding()
    return model
