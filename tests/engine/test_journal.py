"""The journal: whatever happens to its file or its process, what it says is a beginning of what was drawn, and going on
from it gives the tokens of a generation that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import stat
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv4_engine import Engine
from dsv4_engine.errors import InputError
from dsv4_engine.generate import Done, generate
from dsv4_engine.journal import MOST_UNFINISHED, Journal, unfinished
from dsv4_engine.sampling import Sampling
from support.random_checkpoint import make_checkpoint

REQUEST = {"ids": [1, 2, 3], "text": "naïve \n line", "seed": 2**53 - 1, "top_p": 0.95, "none": None}
TOKENS = [5, 0, 129_279, 17, 17]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal" / "run-1.journal"


def write(path: Path, tokens: Sequence[int] = TOKENS) -> None:
    journal = Journal.begin(path, REQUEST)
    for token in tokens:
        journal.append(token)
    journal.close()


def read(path: Path) -> tuple[int, ...]:
    journal, recorded = Journal.take_up(path)
    journal.close()
    assert recorded.request == REQUEST
    return recorded.token_ids


def test_what_was_written_is_read(path: Path) -> None:
    write(path)
    assert read(path) == tuple(TOKENS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_journal_is_gone_on_with(path: Path) -> None:
    write(path, TOKENS[:2])
    journal, recorded = Journal.take_up(path)
    assert recorded.token_ids == tuple(TOKENS[:2])
    for token in TOKENS[2:]:
        journal.append(token)
    journal.close()
    assert read(path) == tuple(TOKENS)
    journal, _ = Journal.take_up(path)
    journal.remove()
    assert unfinished(path.parent) == []


def test_a_journal_in_use_is_left_alone(path: Path) -> None:
    journal = Journal.begin(path, REQUEST)
    assert unfinished(path.parent) == []
    with pytest.raises(InputError, match="another process"):
        Journal.take_up(path)
    with pytest.raises(FileExistsError):
        Journal.begin(path, REQUEST)
    journal.close()
    assert unfinished(path.parent) == [path]


def test_the_newest_comes_first_and_the_oldest_go(path: Path) -> None:
    for number in range(MOST_UNFINISHED + 5):
        write(path.with_name(f"run-{number:02}.journal"))
        os.utime(path.with_name(f"run-{number:02}.journal"), (number, number))
    names = [found.name for found in unfinished(path.parent)]
    assert names == sorted(names, reverse=True)
    assert names[0] == f"run-{MOST_UNFINISHED + 4:02}.journal"
    assert len(names) <= MOST_UNFINISHED + 1  # and the one just written


def test_an_empty_or_absent_folder_has_none(tmp_path: Path) -> None:
    assert unfinished(tmp_path) == unfinished(tmp_path / "absent") == []


def test_torn_at_every_byte(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1
    for size in range(head, len(whole)):
        path.write_bytes(whole[:size])
        journal, recorded = Journal.take_up(path)
        kept = list(recorded.token_ids)
        assert kept == TOKENS[: whole[head:size].count(b"\n")]
        journal.append(99)  # behind what is whole, not behind the torn line
        journal.close()
        assert read(path) == (*kept, 99)


def test_without_a_whole_request_it_is_set_aside_once(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    for size in (0, 1, 20, whole.index(b"\n")):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="set aside") as caught:
            Journal.take_up(path)
        assert caught.value.hint
        assert unfinished(path.parent) == []


def test_flipped_bytes_never_give_a_wrong_token(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flip in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                kept = read(path)
            except InputError:
                assert place <= whole.index(b"\n")
                continue
            assert list(kept) == TOKENS[: len(kept)]
            assert len(kept) < len(TOKENS)


# ---- going on --------------------------------------------------------------------------------------------------------


class Codec:
    """Tokens as letters, of which the first ends a message."""

    eos_id = 1

    def decoder(self) -> Codec:
        return self

    def push(self, token_id: int) -> str:
        return chr(0x4E00 + token_id)

    def finish(self) -> str:
        return ""


IDS = random.Random(3).choices(range(2, 256), k=60)
SAMPLING = Sampling(seed=11)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(make_checkpoint(tmp_path_factory.mktemp("journal") / "m"))


def whole_answer(engine: Engine, **options: object) -> Done:
    *_, done = generate(engine.session(), IDS, Codec(), SAMPLING, max_tokens=24, **options)  # type: ignore[arg-type]
    assert isinstance(done, Done)
    return done


def test_an_answer_goes_on_wherever_it_was_interrupted(engine: Engine) -> None:
    written: list[int] = []
    wanted = whole_answer(engine, record=written.append)
    assert tuple(written) == wanted.token_ids
    for count in (0, 7, 24):
        more: list[int] = []
        done = whole_answer(engine, drawn=written[:count], record=more.append)
        assert (done.token_ids, done.reason, done.parsed.content) == (
            wanted.token_ids,
            wanted.reason,
            wanted.parsed.content,
        )
        assert more == written[count:]


def test_what_was_drawn_is_not_drawn_again(engine: Engine) -> None:
    """Tokens are taken as recorded, whatever the model thinks of them."""
    strange = [200, 200, 200, 7]
    assert whole_answer(engine, drawn=strange).token_ids[:4] == tuple(strange)


def answer_in_a_process(engine: Engine, path: Path, result: Path) -> None:
    """Begin or go on, and write the tokens to ``result`` at the end; never returns."""
    try:
        try:
            journal, recorded = Journal.take_up(path)
            drawn = recorded.token_ids
        except (FileNotFoundError, InputError):  # nothing yet, or killed within the request
            journal, drawn = Journal.begin(path, REQUEST), ()
        done = whole_answer(engine, drawn=drawn, record=journal.append)
        result.write_text(" ".join(map(str, done.token_ids)))
        journal.remove()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(engine: Engine, tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    started = time.monotonic()
    wanted = " ".join(map(str, whole_answer(engine).token_ids))
    seconds = time.monotonic() - started
    path, result = tmp_path / "run.journal", tmp_path / "result"
    killed = 0
    while killed < kills:
        process = os.fork()
        if process == 0:
            answer_in_a_process(engine, path, result)
        time.sleep(rng.uniform(0, 1.2 * seconds))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            assert os.WEXITSTATUS(status) == 0
        if result.exists():
            assert result.read_text() in (wanted, "")  # killed between making it and writing it
            result.unlink()
            path.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        answer_in_a_process(engine, path, result)
    assert os.waitpid(process, 0)[1] == 0
    assert result.read_text() == wanted
