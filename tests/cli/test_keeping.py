"""The prefix cache and the journal as `run` and `chat` use them: second runs, --no-cache, --resume, kill -9."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4cli import conversation, keeping
from dsv4cli.answering import How, Outcome, Screen
from dsv4cli.keeping import Keeping
from dsv4cli.options import Think

from .conftest import Cli, Result, environment, write_model

ANSWER = ["--max-tokens", "12", "--seed", "3"]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for prompts of several segments."""
    return write_model(tmp_path_factory.mktemp("roomy"), max_position_embeddings=16384)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of 2,300 tokens, a segment and more."""
    file = tmp_path / "book.txt"
    file.write_text("".join(random.Random(0).choices("abcdefgh \n", k=2300)), encoding="utf-8")
    return file


@pytest.fixture
def ask(cli: Cli, roomy: Path, book: Path) -> Callable[..., Result]:
    def run(question: str, *more: str | Path) -> Result:
        done = cli("run", question, "--file", book, "--model", roomy, "--json", *ANSWER, *more)
        assert done.code == 0, done.err
        return done

    return run


def journals() -> list[Path]:
    return sorted(keeping.journal_folder().glob("*")) if keeping.journal_folder().exists() else []


def test_a_second_question_reads_only_what_is_new(ask: Callable[..., Result], book: Path) -> None:
    alone = ask("Why?", "--no-cache").json
    first, second, other = ask("Why?").json, ask("Why?").json, ask("And how is that?").json
    assert first["text"] == second["text"] == alone["text"]
    assert (alone["usage"]["cached_tokens"], first["usage"]["cached_tokens"]) == (0, 0)
    assert second["usage"]["cached_tokens"] == (second["usage"]["prompt_tokens"] - 1) // 512 * 512  # whole chunks
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    assert other["usage"]["cached_tokens"] >= 2048
    text = book.read_text()
    book.write_text(text[:2200] + "X" + text[2201:])
    edited = ask("Why?").json
    assert edited["usage"]["cached_tokens"] == 2048  # the segment before it
    assert edited["text"] == ask("Why?", "--no-cache").json["text"]


def test_every_policy_answers_alike(ask: Callable[..., Result], tmp_path: Path) -> None:
    for policy, reused in (("full", 2048), ("zero", 1536), ("periodic:2K", 2048)):
        found = [ask("Why?", "--cache-policy", policy, "--cache-dir", tmp_path / policy[:4]).json for _ in range(2)]
        assert found[0]["text"] == found[1]["text"]
        assert found[1]["usage"]["cached_tokens"] >= reused


@pytest.mark.parametrize("policy", ["some", "full:2K", "periodic:0", "periodic:x", ""])
def test_a_wrong_policy_is_refused(cli: Cli, roomy: Path, policy: str) -> None:
    done = cli("run", "Why?", "--model", roomy, "--cache-policy", policy)
    assert done.code == 2


def test_no_cache_leaves_nothing_on_disk(ask: Callable[..., Result]) -> None:
    ask("Why?", "--no-cache")
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        assert not list(Path(os.environ[variable]).iterdir())


def test_the_cache_folder_can_be_chosen_and_is_private(ask: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    ask("Why?", "--cache-dir", folder)
    assert ask("Why?", "--cache-dir", folder).json["usage"]["cached_tokens"] > 0
    assert ask("Why?").json["usage"]["cached_tokens"] == 0
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_miss_says_why(ask: Callable[..., Result]) -> None:
    assert "came from the cache" not in ask("Why?").err
    other = ask("Why?", "--kv-dtype", "bf16")
    assert other.json["usage"]["cached_tokens"] == 0
    assert "nothing of the prompt came from the cache, because it is kept in another format (kv mixed" in other.err


def test_a_store_that_cannot_be_used_costs_no_answer(ask: Callable[..., Result], tmp_path: Path) -> None:
    wanted = ask("Why?", "--no-cache").json["text"]
    folder = tmp_path / "kept"
    ask("Why?", "--cache-dir", folder)
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    assert ask("Why?", "--cache-dir", folder).json["text"] == wanted


def test_an_answer_that_ended_leaves_no_journal(ask: Callable[..., Result]) -> None:
    ask("Why?")
    assert journals() == []


# ---- run --resume ----------------------------------------------------------------------------------------------------


def test_nothing_to_resume(cli: Cli) -> None:
    done = cli("run", "--resume")
    assert (done.code, done.out) == (2, "")
    assert "there is no interrupted answer of `dsv4 run`" in done.err


@pytest.mark.parametrize("flags", [["Why?"], ["--file", "x"], ["--seed", "3"], ["--no-cache"], ["--model", "tiny"]])
def test_resume_takes_nothing_that_was_decided(cli: Cli, flags: list[str]) -> None:
    done = cli("run", "--resume", *flags)
    assert done.code == 2
    assert "cannot be combined with" in done.err


def test_ctrl_c_and_resume(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_engine import Session

    arguments = ["run", "Why?", "--model", model, "--json", "--think", "high", "--stop", "zzz", *ANSWER]
    wanted = cli(*arguments, "--no-cache").json
    extend, calls = Session.extend, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            signal.raise_signal(signal.SIGINT)
        return extend(*arguments, **options)

    monkeypatch.setattr(Session, "extend", interrupted)
    stopped = cli(*arguments)
    assert (stopped.code, stopped.json["finish_reason"]) == (130, "cancelled")
    assert "`dsv4 run --resume` goes on with it" in stopped.err
    found = cli("run", "--resume", "--json")
    assert found.code == 0
    assert "going on with an answer of 7 tokens" in found.err
    for key in ("text", "reasoning", "finish_reason", "seed", "usage", "model"):
        assert found.json[key] == wanted[key]
    assert journals() == []


def killed_once_it_began(command: list[str], settings: dict[str, str], at: float) -> bool:
    """Start a run, kill -9 it so many seconds after its first output; whether it was still going."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=settings)
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(at)
    process.kill()
    process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_and_resume(cli: Cli, model: Path, kills: int) -> None:
    rng = random.Random(0)
    dsv4 = [sys.executable, "-m", "dsv4cli"]
    arguments = ["run", "Why?", "--model", str(model), "--max-tokens", "150", "--seed", "5"]
    wanted = cli(*arguments, "--no-cache").out
    command = [*dsv4, *arguments]
    for _ in range(kills):
        if killed_once_it_began(command, environment(), rng.uniform(0, 0.3)) and journals():
            command = [*dsv4, "run", "--resume"]
        else:
            shutil.rmtree(keeping.journal_folder(), ignore_errors=True)
            command = [*dsv4, *arguments]
    for _ in range(20):  # a busy machine may let it end before it is killed
        if journals() or killed_once_it_began([*dsv4, *arguments], environment(), 0.0):
            break
    assert cli("run", "--resume").out == wanted
    assert journals() == []


def test_another_model_in_its_place_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Killed):
        cli("run", "Why?", "--model", folder, *ANSWER)
    shutil.rmtree(folder)
    write_model(folder, seed=1)
    done = cli("run", "--resume")
    assert done.code == 2
    assert "is no longer the model that began this answer" in done.err


def test_a_journal_that_cannot_be_written_costs_no_answer(cli: Cli, model: Path) -> None:
    wanted = cli("run", "Why?", "--model", model, "--no-cache", *ANSWER).out
    (Path(os.environ["XDG_STATE_HOME"]) / "dsv4").write_text("not a folder")
    done = cli("run", "Why?", "--model", model, *ANSWER)
    assert (done.code, done.out) == (0, wanted)
    assert "no journal is written" in done.err


# ---- chat ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of kill -9: nothing of ours catches it."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The answer is interrupted when so many tokens of it are recorded."""
    record = keeping.Recorder.record

    def recorded(self: keeping.Recorder, token_id: int) -> None:
        nonlocal tokens
        record(self, token_id)
        tokens -= 1
        if tokens == 0:
            self.leave()  # as the system does with a dead process' locks
            raise Killed

    monkeypatch.setattr(keeping.Recorder, "record", recorded)


class Talk:
    """A conversation over the roomy model that keeps what it reads."""

    def __init__(self, engine: Any, *, kept: Keeping, think: Think = Think.none, seed: int | None = 5) -> None:
        from dsv4_engine.sampling import Sampling

        self.conversation = conversation.Conversation(engine, kept)
        self.how = How(Sampling(seed=seed), think, max_tokens=10)

    def ask(self, text: str) -> Outcome:
        return self.conversation.ask(text, self.how, Screen(None))

    def take_up(self) -> Outcome:
        return self.conversation.take_up(*keeping.take_up("chat"), Screen(None))


@pytest.fixture(scope="module")
def engine(roomy: Path) -> Any:
    from dsv4_engine import Engine

    return Engine.load(roomy)


@pytest.fixture
def kept(engine: Any) -> Iterator[Keeping]:
    with Keeping.of("chat", engine, None, None, "periodic", nothing=False) as keeping:
        yield keeping


def same_state(a: Any, b: Any) -> bool:
    pairs = [
        pair
        for x, y in zip(a.state.layers, b.state.layers, strict=True)
        for pair in ((x.window, y.window), *((r.read(0, len(r)), s.read(0, len(s))) for r, s in rows(x, y)))
    ]
    return a.tokens == b.tokens and a.cuts == b.cuts and all(torch.equal(x, y) for x, y in pairs)


def rows(a: Any, b: Any) -> list[tuple[Any, Any]]:
    pairs = [(a.entries, b.entries), (a.index_keys, b.index_keys)]
    return [(x, y) for x, y in pairs if x is not None]


QUESTIONS = ["x" * 600, "And?", "y" * 900, "Why?"]


@pytest.mark.parametrize(
    ("think", "turn", "tokens"),
    [
        (Think.none, 1, 4),
        (Think.high, 3, 10),
        *(pytest.param(Think.none, turn, 3, marks=pytest.mark.slow) for turn in range(4)),
        *(pytest.param(Think.high, turn, 3, marks=pytest.mark.slow) for turn in range(4)),
    ],
)
def test_a_chat_goes_on_as_if_nothing_had_been(
    engine: Any, kept: Keeping, monkeypatch: pytest.MonkeyPatch, think: Think, turn: int, tokens: int
) -> None:
    straight = Talk(engine, kept=Keeping("chat"), think=think)
    for question in QUESTIONS:
        straight.ask(question)
    killed = Talk(engine, kept=kept, think=think)
    for question in QUESTIONS[:turn]:
        killed.ask(question)
    interrupt_after(monkeypatch, tokens)
    with pytest.raises(Killed):
        killed.ask(QUESTIONS[turn])
    monkeypatch.setattr(keeping.Recorder, "record", lambda self, token: None)
    again = Talk(engine, kept=kept, think=think)
    again.take_up()
    for question in QUESTIONS[turn + 1 :]:
        again.ask(question)
    assert again.conversation.messages == straight.conversation.messages
    assert again.conversation.session is not None
    assert same_state(again.conversation.session, straight.conversation.session)


def test_a_file_in_a_later_turn_is_kept_too(engine: Any, kept: Keeping) -> None:
    """The turn goes back to whole chunks, so that what it brings can be found again."""
    talk = Talk(engine, kept=kept)
    talk.ask("Hello.")
    first = talk.ask("x" * 2600)
    assert first.cached_tokens == 0
    other = Talk(engine, kept=kept)
    other.conversation.messages = talk.conversation.messages[:2]
    second = other.ask("x" * 2600)
    assert second.cached_tokens >= 2560
    assert second.text == first.text


def test_a_kept_conversation_starts_from_the_cache(engine: Any, kept: Keeping) -> None:
    talk = Talk(engine, kept=kept)
    talk.ask("x" * 2600)
    fresh, plain = Talk(engine, kept=kept), Talk(engine, kept=Keeping("chat"))
    for other in (fresh, plain):
        other.conversation.messages = list(talk.conversation.messages)
    found, wanted = fresh.ask("And?"), plain.ask("And?")
    assert (found.cached_tokens >= 2560, wanted.cached_tokens) == (True, 0)
    assert found.text == wanted.text


def test_a_chat_that_ends_leaves_no_journal(cli: Cli, model: Path) -> None:
    cli("chat", "--model", model, *ANSWER, input="Why?\nHow?\n")
    assert journals() == []


def test_chat_resume(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["chat", "--model", model, "--json", "--system", "Be brief.", *ANSWER]
    wanted = cli(*arguments, input="One?\nTwo?\nThree?\n").json
    interrupt_after(monkeypatch, 12 + 6)
    with pytest.raises(Killed):
        cli(*arguments, input="One?\nTwo?\n")
    monkeypatch.setattr(keeping.Recorder, "record", lambda self, token: None)
    found = cli("chat", "--resume", "--json", input="Three?\n")
    assert found.code == 0, found.err
    assert found.json["messages"] == wanted["messages"]
    assert found.json["system"] == wanted["system"]
    assert "going on with an answer of 6 tokens" in found.err
    assert journals() == []


def test_an_idle_chat_can_be_resumed(engine: Any, kept: Keeping) -> None:
    """Its last answer is told again, and the next one is what it would have been."""
    straight = Talk(engine, kept=Keeping("chat"))
    for question in ("One?", "Two?", "Three?"):
        straight.ask(question)
    closed = Talk(engine, kept=kept)
    closed.ask("One?"), closed.ask("Two?")
    closed.conversation._recorder.leave()
    again = Talk(engine, kept=kept)
    assert again.take_up().text == straight.conversation.messages[3]["content"]
    again.ask("Three?")
    assert again.conversation.messages == straight.conversation.messages


def test_journals_of_another_version_are_refused(cli: Cli) -> None:
    from dsv4_engine.journal import Journal

    Journal.begin(keeping.journal_folder() / "run-1.journal", json.loads('{"prompt": "Why?"}')).close()
    done = cli("run", "--resume")
    assert done.code == 2
    assert "of another version of dsv4" in done.err
