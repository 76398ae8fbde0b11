"""Both models on one text: the numbers against their definitions, and that memory does not follow the vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4_engine import Engine
from dsv4_engine.errors import InputError, PromptError
from dsv4_engine.locate import resolve_model
from dsv4_engine.quantize import check, compare, quantize
from support.expanded_checkpoint import expand_checkpoint

TEXT = "The code of the north gate is 4417. Whoever comes late asks the guard at the tower for the key.\n" * 3


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with its experts' values rounded once more, coarsely, so that its answers change a little."""
    folder = tmp_path_factory.mktemp("coarse")
    plain = expand_checkpoint(resolve_model("tiny"), folder / "plain")
    shutil.copy(resolve_model("tiny") / "tokenizer.json", plain)
    return plain


def test_the_numbers_are_what_they_say(coarse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ROWS", 40)
    told = list[tuple[int, int]]()
    got = compare("tiny", coarse, TEXT, progress=lambda done, total: told.append((done, total)))
    ids = check.token_ids("tiny", TEXT)
    assert ids[0] == Engine.load("tiny").tokenizer.bos_id and len(ids) > 80
    logits = []
    for model in ("tiny", coarse):
        session = Engine.load(model, ctx=len(ids)).session()
        parts = [session.extend(ids[i : i + 40], logits="all") for i in range(0, len(ids), 40)]
        logits.append(torch.cat(parts)[:-1].double())
    target = torch.tensor(ids[1:])
    losses = [float(F.cross_entropy(x, target)) for x in logits]
    kl = F.kl_div(*(F.log_softmax(x, -1) for x in reversed(logits)), reduction="none", log_target=True).sum(-1)
    assert got.tokens == len(ids) - 1
    assert (got.loss_before, got.loss_after) == (pytest.approx(losses[0]), pytest.approx(losses[1]))
    assert got.loss_change == pytest.approx(losses[1] - losses[0])
    assert got.kl_mean == pytest.approx(float(kl.mean())) and got.kl_max == pytest.approx(float(kl.max()))
    assert 0 < got.kl_median <= got.kl_p99 <= got.kl_max
    assert got.same_top == float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean())
    assert told[-1] == (2 * len(ids), 2 * len(ids)) and [d for d, _ in told] == sorted(d for d, _ in told)


def test_a_model_against_itself(tmp_path: Path) -> None:
    quantize("tiny", tmp_path / "fp8", "fp8")
    got = compare("tiny", tmp_path / "fp8", TEXT)
    assert (got.loss_change, got.kl_max, got.same_top) == (0.0, 0.0, 1.0)


def test_one_token_is_enough(coarse: Path) -> None:
    assert compare("tiny", coarse, "x").tokens == 1


def test_texts_that_cannot_be_compared_on(coarse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="empty"):
        compare("tiny", coarse, "")
    usage = shutil.disk_usage(coarse)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(InputError, match=r"the logits of \d+ tokens take .* and .* has 1000 B") as caught:
        compare("tiny", coarse, TEXT)
    assert "TMPDIR" in caught.value.hint
