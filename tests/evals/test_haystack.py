"""The haystack: exact sizes, fixed by its rng, no paragraph twice while there is other text."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dsv4_evals.errors import DataError
from dsv4_evals.haystack import PARAGRAPH_CHARACTERS, RECORD_CHARACTERS, Haystack
from support.fake_model import FakeModel

BYTES = FakeModel()


@pytest.fixture(scope="module")
def bundled() -> Haystack:
    return Haystack.bundled()


def paragraphs(ids: list[int]) -> list[str]:
    """Long paragraphs of a take, without its first and last, which may be cut."""
    return [p for p in BYTES.decode(ids).split("\n\n")[1:-1] if len(p) >= PARAGRAPH_CHARACTERS]


def test_the_bundled_text_is_large_and_diverse(bundled: Haystack) -> None:
    assert bundled.characters > 6_500_000
    assert len(bundled.records) > 500
    assert max(map(len, bundled.records)) <= RECORD_CHARACTERS + 2
    assert bundled.about()["digest"] == Haystack.bundled().digest


@pytest.mark.parametrize("tokens", [0, 1, 1000, 200_000])
def test_a_take_has_the_size_asked_for(bundled: Haystack, tokens: int) -> None:
    assert len(bundled.filler(BYTES).take(tokens, random.Random(1))) == tokens


def test_a_take_depends_on_its_rng_alone(bundled: Haystack) -> None:
    filler = bundled.filler(BYTES)
    first = filler.take(50_000, random.Random(5))
    filler.take(80_000, random.Random(6))
    assert filler.take(50_000, random.Random(5)) == first
    assert bundled.filler(BYTES).take(20_000, random.Random(5)) == first[:20_000]
    assert filler.take(50_000, random.Random(6)) != first


def test_no_paragraph_comes_twice_before_all_text_was_used(bundled: Haystack) -> None:
    most = Counter(paragraphs(bundled.filler(BYTES).take(6_000_000, random.Random(2)))).most_common(1)
    assert most[0][1] == 1


def test_samples_begin_with_different_records(bundled: Haystack) -> None:
    filler = bundled.filler(BYTES)
    assert len({bytes(filler.take(200, random.Random(seed))) for seed in range(20)}) == 20


def test_all_of_a_small_text_is_used_before_any_comes_again() -> None:
    texts = [f"Paragraph number {i} of this text, " + "and its words go on " * 5 for i in range(40)]
    haystack = Haystack.from_texts(["\n\n".join(texts[:25]), "\n\n".join(texts[25:])])
    filler = haystack.filler(BYTES)
    once = sum(len(record) + 2 for record in haystack.records)
    seen = Counter(BYTES.decode(filler.take(once, random.Random(3))).split("\n\n"))
    seen.pop("", None)
    assert set(seen.values()) == {1}
    assert set(seen) == {text.rstrip() for text in texts}
    twice = Counter(BYTES.decode(filler.take(2 * once, random.Random(3))).split("\n\n"))
    assert {twice[text.rstrip()] for text in texts} == {2}


def test_paragraphs_of_several_files_are_kept_once() -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 2
    haystack = Haystack.from_texts([f"{licence}\n\nalpha one", f"beta two\n\n{licence}\n\nx", licence])
    assert sum(record.count("Permission") for record in haystack.records) == 2  # one paragraph holds it twice
    assert haystack.records[0].endswith("alpha one")


def test_one_long_line_is_cut_into_records() -> None:
    haystack = Haystack.from_texts(["word " * 40_000])
    assert all(len(record) <= RECORD_CHARACTERS for record in haystack.records)
    assert "".join(record + " " for record in haystack.records).split() == ["word"] * 40_000


@pytest.mark.parametrize("texts", [[], [" \n\n \t\n"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        Haystack.from_texts(texts)


def test_capacity_is_about_the_number_of_tokens(bundled: Haystack) -> None:
    assert bundled.filler(BYTES).capacity() == pytest.approx(bundled.characters, rel=0.05)
