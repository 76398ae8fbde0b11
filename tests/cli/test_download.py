"""`dsv4 download` as it is used: what it prints, its exit codes, and processes that are killed, stopped, or two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsv4_engine.locate import HUB_ALIASES
from support.hub_server import COMMIT, REPO, Hub, environment_for, hub_serving, repository, use

from .conftest import Cli, Result, environment, write_model

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
LARGE = 3 << 20  # bytes of a shard where a download is caught in its middle


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model that answers, as a repository."""
    folder = write_model(tmp_path_factory.mktemp("published"), shards=3)
    return repository({file.name: file.read_bytes() for file in sorted(folder.iterdir())})


@pytest.fixture
def hub(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving(published) as hub:
        use(hub, tmp_path / "home" / "hub", monkeypatch)
        yield hub


def started(hub: Hub, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with the hub's variables in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "dsv4cli", "download", *arguments],
        env={**environment(), **environment_for(hub, home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def make_large(hub: Hub) -> None:
    """Shards that take some chunks to come; what they hold is nobody's business on the way."""
    for number, name in enumerate(SHARDS):
        hub.files[name] = bytes([number]) * LARGE


def shards_sent(hub: Hub) -> int:
    return sum(hub.sent[name] for name in SHARDS)


def kept(folder: Path) -> int:
    """Bytes of shards that are not finished; 0 while small files are not either."""
    sizes = []
    for path in folder.rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # done meanwhile
            sizes.append(path.stat().st_size)
    return sum(sizes) if len(sizes) == len(SHARDS) else 0


def test_download_inspect_run(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB_ALIASES, "v4-flash", REPO)
    unknown = cli("run", "Why?", "--model", "v4-flash")
    assert unknown.code == 2
    assert "Download it first: dsv4 download v4-flash" in unknown.err

    done = cli("download", "v4-flash")
    assert done.code == 0, done.err
    assert f"{REPO} is whole: 8 files" in done.out
    assert "every hash right" in done.out
    assert "dsv4 inspect v4-flash --plan" in done.out
    assert "--model v4-flash" in done.out
    assert f"{REPO} at {COMMIT[:12]}" in done.err
    assert "nothing had to come" in cli("download", "v4-flash").out

    assert cli("inspect", "v4-flash", "--json").json["disk"]["total"] > 0
    answer = cli("run", "Why?", "--model", "v4-flash", "--max-tokens", "3", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["usage"]["completion_tokens"] == 3


def test_json(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    found = cli("download", REPO, "--dir", folder, "--json").json
    assert found["model"] == found["folder"] == str(folder)
    assert (found["repo"], found["revision"], found["commit"]) == (REPO, "main", COMMIT)
    assert found["bytes"] == found["transferred_bytes"] == sum(hub.sent.values())
    assert 0 < found["transfer_s"] <= found["total_s"]
    assert cli("inspect", folder).code == 0
    told = cli("download", REPO, "--dir", folder).out
    assert f"--model '{folder}'" in told


def test_another_revision_is_named_by_its_folder(cli: Cli, hub: Hub) -> None:
    hub.revisions["v2"] = "d" * 40
    found = cli("download", REPO, "--revision", "v2", "--json").json
    assert found["model"] == found["folder"]
    assert found["folder"].endswith("d" * 40)


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["tiny"], 2, "tiny comes with dsv4", "dsv4 run"),
        (["nonsense"], 2, "unknown model 'nonsense'", "owner/name"),
        (["some/thing"], 2, "has no model some/thing", "HF_TOKEN"),
        ([REPO, "--revision", "v9"], 2, "no revision 'v9'", "branches"),
    ],
)
def test_wrong_names(cli: Cli, hub: Hub, arguments: list[str], code: int, message: str, hint: str) -> None:
    done = cli("download", *arguments, "--json")
    assert (done.code, done.out) == (code, "")
    assert message in done.err.splitlines()[0]
    assert hint in done.err.splitlines()[1]


def test_failures_and_wrong_input_have_different_codes(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.trouble(SHARDS[0], corrupt=2)
    done = cli("download", REPO)
    assert (done.code, "has the hash" in done.err) == (1, True)
    unfinished = cli("run", "Why?", "--model", REPO)
    assert unfinished.code == 2
    assert f"Finish it: dsv4 download {REPO}" in unfinished.err
    hub.gated = True
    done = cli("download", REPO)
    assert (done.code, "is gated" in done.err) == (2, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = cli("download", REPO)
    assert (done.code, "HF_HUB_OFFLINE" in done.err) == (2, True)


def test_killed_and_continued(hub: Hub, tmp_path: Path) -> None:
    make_large(hub)
    hub.rate = 2e6
    process = started(hub, tmp_path, REPO, "--dir", str(tmp_path / "own"))
    wait_for(lambda: kept(tmp_path / "own") > LARGE)
    process.kill()
    process.communicate()
    had = kept(tmp_path / "own")
    assert LARGE < had < 3 * LARGE

    hub.rate = None
    hub.forget()
    done = ended(started(hub, tmp_path, REPO, "--dir", str(tmp_path / "own"), "--json"))
    assert done.code == 0, done.err
    assert shards_sent(hub) == 3 * LARGE - had
    assert sum(start for name, start in hub.asked if name in SHARDS) == had
    assert all((tmp_path / "own" / name).read_bytes() == hub.files[name] for name in SHARDS)
    assert done.json["transferred_bytes"] < done.json["bytes"] - LARGE
    assert "of it here already" in done.err


def test_ctrl_c_says_how_to_go_on(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    make_large(hub)
    hub.rate = 2e6
    process = started(hub, tmp_path / "home", REPO, "--revision", "main")
    wait_for(lambda: kept(tmp_path) > LARGE)
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.splitlines()[-2:] == [
        "stopped",
        f"hint: What has come is kept. Go on with: dsv4 download {REPO}",
    ]
    assert "unfinished" in cli("run", "Why?", "--model", REPO).err
    had = kept(tmp_path)
    hub.rate = None
    hub.forget()
    assert ended(started(hub, tmp_path / "home", REPO)).code == 0
    assert shards_sent(hub) == 3 * LARGE - had


def test_two_at_once_share_the_work(hub: Hub, tmp_path: Path) -> None:
    make_large(hub)
    hub.rate = 1e5
    first = started(hub, tmp_path, REPO, "--json")
    wait_for(lambda: shards_sent(hub) > 0)
    second = started(hub, tmp_path, REPO, "--json")
    assert second.stderr is not None
    assert "another download of this model is running" in second.stderr.readline()
    hub.rate = None
    results = [ended(first), ended(second)]
    assert [result.code for result in results] == [0, 0], results
    assert shards_sent(hub) == 3 * LARGE
    assert results[0].json["folder"] == results[1].json["folder"]
    assert results[1].json["transferred_bytes"] == 0


def test_nothing_is_drawn_into_a_pipe_and_nothing_of_the_hubs_log(hub: Hub, tmp_path: Path) -> None:
    hub.trouble(SHARDS[0], drops=[1000])
    done = ended(started(hub, tmp_path, REPO))
    assert done.code == 0
    assert "signature" not in done.err
    assert "\x1b" not in done.err + done.out
    assert "\r" not in done.err + done.out


def test_a_terminal_sees_rate_and_time_left(hub: Hub, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    make_large(hub)
    hub.rate = 2e6
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4cli", "download", REPO],
        env={**environment(), **environment_for(hub, tmp_path), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    seen = read_all(main)
    assert process.wait(60) == 0
    assert "Downloading" in seen
    assert " of 9." in seen
    assert "MiB/s" in seen
    assert "0:0" in seen or "00:0" in seen


def read_all(terminal: int) -> str:
    parts: list[bytes] = []
    while True:
        try:
            parts.append(os.read(terminal, 65536))
        except OSError:  # the other side is closed
            break
    os.close(terminal)
    return b"".join(parts).decode()
