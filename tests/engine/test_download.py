"""Downloads from a server that speaks the hub's protocol: what is taken, what goes wrong, and that nothing wrong stays.

Every byte that comes twice without need is a failure: the server counts.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="what huggingface-hub 2 transfers with: pip install -e .")

from dsv4_engine import download as machinery
from dsv4_engine import hub as hub_client
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.download import Done, download
from dsv4_engine.errors import CheckpointError, ConfigError, DownloadError, InputError
from dsv4_engine.locate import DOWNLOAD_MARK, INDEX_NAME, resolve_model
from support.hub_server import COMMIT, REPO, Hub, etag, hub_serving, repository, use
from support.random_checkpoint import make_checkpoint

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
NEEDED = {"config.json", "tokenizer.json", "LICENSE", "encoding/encoding_dsv4.py", INDEX_NAME, *SHARDS}
CHUNK = 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small checkpoint in three shards."""
    folder = make_checkpoint(tmp_path_factory.mktemp("published"), shards=3, quantised=True)
    return {"tokenizer.json": b'{"model": 1}', **{file.name: file.read_bytes() for file in sorted(folder.iterdir())}}


@pytest.fixture
def hub(checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_serving(repository(checkpoint)) as hub:
        use(hub, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(hub_client, "CHUNK", CHUNK)
        monkeypatch.setattr(hub_client, "PATIENCE", 0.0)
        yield hub


@pytest.fixture(params=["cache", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Both kinds of place: the hub's cache, and a folder of one's own."""
    return None if request.param == "cache" else tmp_path / "own"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and DOWNLOAD_MARK not in path.parts
    }


def needed(hub: Hub) -> dict[str, bytes]:
    return {name: content for name, content in hub.files.items() if name in NEEDED}


def lengths(hub: Hub, names: Sequence[str] | set[str] = tuple(NEEDED)) -> dict[str, int]:
    return {name: len(hub.files[name]) for name in names}


def place_of(hub: Hub, done: Done, name: str) -> Path:
    """The real file behind a name, not a link to it."""
    return (done.folder / name).resolve()


# ---- what is taken, and where it goes --------------------------------------------------------------------------------


def test_takes_what_the_engine_needs_and_checks_it_when_asked_again(hub: Hub, place: Path | None) -> None:
    done = download(REPO, folder=place)
    assert contents(done.folder) == needed(hub)
    assert hub.sent == lengths(hub)
    assert (done.files, done.bytes) == (len(NEEDED), sum(lengths(hub).values()))
    assert (done.transferred, done.commit) == (done.bytes, COMMIT)
    assert resolve_model(place or REPO) == done.folder
    assert Checkpoint.open(done.folder).names

    bars: list[tuple[str, int, int]] = []

    class Bar:
        def __init__(self, label: str) -> None:
            self.label = label

        def __enter__(self) -> Any:
            return lambda done, total: bars.append((self.label, done, total))

        def __exit__(self, *error: object) -> None:
            pass

    again = download(REPO, folder=place, bar=Bar)
    assert (again.folder, again.transferred) == (done.folder, 0)
    assert hub.sent == lengths(hub)
    assert bars[-1] == ("Checking", done.bytes, done.bytes)
    assert not list((place or done.folder.parents[1]).rglob("*.incomplete"))


def test_the_cache_is_laid_out_as_the_hub_expects_it(hub: Hub) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    done = download(REPO)
    assert snapshot_download(REPO, local_files_only=True) == str(done.folder)
    found = scan_cache_dir()
    assert not found.warnings
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (REPO, COMMIT, frozenset({"main"}))
    assert {file.blob_path.name for file in revision.files} == {etag(n, hub.files[n]) for n in NEEDED}


def test_another_revision_shares_what_is_the_same_and_leaves_main_alone(hub: Hub) -> None:
    first = download(REPO)
    other = "f" * 40
    hub.revisions["v2"] = other
    hub.files["LICENSE"] = b"MIT, really\n"
    hub.forget()
    done = download(REPO, "v2")
    assert done.folder.name == other
    assert hub.sent == lengths(hub, {"LICENSE"})
    assert resolve_model(REPO) == first.folder
    assert (first.folder / "LICENSE").read_bytes() == b"MIT\n"


def test_only_another_revision_is_not_taken_for_main(hub: Hub) -> None:
    hub.revisions["v2"] = hub.commit
    done = download(REPO, "v2")
    with pytest.raises(InputError, match=r"main revision .* is not downloaded") as error:
        resolve_model(REPO)
    assert str(done.folder) in error.value.hint


def test_an_update_that_was_interrupted_leaves_the_old_commit_in_use(hub: Hub) -> None:
    old = download(REPO)
    hub.commit, hub.files[SHARDS[0]] = "c" * 40, b"new weights"
    hub.trouble(SHARDS[0], corrupt=2)
    with pytest.raises(DownloadError):
        download(REPO)
    assert resolve_model(REPO) == old.folder
    assert download(REPO).folder == resolve_model(REPO) != old.folder


def test_killed_between_two_links_it_is_still_unfinished(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    links, symlink = [0], os.symlink

    def some(*arguments: Any) -> None:
        links[0] += 1
        if links[0] == len(NEEDED):  # one is a trial, and one is not made
            raise KeyboardInterrupt
        symlink(*arguments)

    monkeypatch.setattr(os, "symlink", some)
    with pytest.raises(KeyboardInterrupt):
        download(REPO)
    with pytest.raises(InputError, match="unfinished"):
        resolve_model(REPO)


def test_a_single_file_of_weights_without_an_index(hub: Hub) -> None:
    for name in (INDEX_NAME, *SHARDS):
        del hub.files[name]
    hub.files["model.safetensors"] = b"weights"
    done = download(REPO)
    assert (done.folder / "model.safetensors").read_bytes() == b"weights"
    assert "original" not in {path.name for path in done.folder.iterdir()}


def test_equal_files_come_once(hub: Hub) -> None:
    hub.files["LICENSE-CODE"] = hub.files["LICENSE"]
    done = download(REPO)
    assert hub.sent["LICENSE"] + hub.sent["LICENSE-CODE"] == len(hub.files["LICENSE"])
    assert (done.folder / "LICENSE-CODE").read_bytes() == (done.folder / "LICENSE").read_bytes() == b"MIT\n"


# ---- lines that break ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drops", "resets"])
def test_goes_on_in_the_middle_of_a_file(
    hub: Hub, place: Path | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "PATIENCE", 300.0)
    monkeypatch.setattr("threading.Event.wait", lambda self, timeout=None: self.is_set() or timeout is not None)
    hub.trouble(SHARDS[1], **{kind: [50_000, 3, 0, 70_000]})
    done = download(REPO, folder=place)
    assert contents(done.folder) == needed(hub)
    starts = [start for name, start in hub.asked if name == SHARDS[1]]
    assert len(starts) == 5
    assert starts == sorted(starts)
    # What came is kept up to the last whole chunk before each break.
    assert hub.sent[SHARDS[1]] - len(hub.files[SHARDS[1]]) <= 4 * CHUNK


def test_what_came_before_a_failure_does_not_come_again(hub: Hub, place: Path | None) -> None:
    hub.trouble(SHARDS[0], drops=[60_000] + [0] * 50)
    with pytest.raises(DownloadError, match="broke") as error:
        download(REPO, folder=place)
    assert "goes on where it stopped" in error.value.hint
    with pytest.raises(InputError, match="unfinished") as unfinished:
        resolve_model(place or REPO)
    assert "dsv4 download" in unfinished.value.hint

    hub.troubles.clear()
    kept = partial(hub, place, SHARDS[0])
    had = kept.stat().st_size
    hub.forget()
    done = download(REPO, folder=place)
    assert contents(done.folder) == needed(hub)
    assert (SHARDS[0], had) in hub.asked
    assert hub.sent[SHARDS[0]] == len(hub.files[SHARDS[0]]) - had


def partial(hub: Hub, place: Path | None, name: str) -> Path:
    """What is there of an unfinished file."""
    from huggingface_hub import constants

    start = name if place else etag(name, hub.files[name])
    (found,) = (place or Path(constants.HF_HUB_CACHE)).rglob(f"{start}*.incomplete")
    return found


def test_statuses_that_pass_are_waited_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "PATIENCE", 300.0)
    monkeypatch.setattr("threading.Event.wait", lambda self, timeout=None: self.is_set() or timeout is not None)
    hub.trouble(SHARDS[2], statuses=[503, 500])
    said: list[str] = []
    assert contents(download(REPO, say=said.append).folder) == needed(hub)
    assert sum("503" in text or "500" in text for text in said) == 2


def test_a_server_that_knows_no_ranges_sends_all_again(hub: Hub, place: Path | None) -> None:
    hub.trouble(SHARDS[0], drops=[60_000] + [0] * 50)
    with pytest.raises(DownloadError):
        download(REPO, folder=place)
    hub.trouble(SHARDS[0], no_ranges=True)
    hub.forget()
    done = download(REPO, folder=place)
    assert contents(done.folder) == needed(hub)
    assert hub.sent[SHARDS[0]] == len(hub.files[SHARDS[0]])
    assert done.transferred >= len(hub.files[SHARDS[0]])


# ---- wrong bytes -----------------------------------------------------------------------------------------------------


def test_corrupt_bytes_are_seen_and_fetched_again(hub: Hub, place: Path | None) -> None:
    hub.trouble(SHARDS[0], corrupt=1)
    hub.trouble(INDEX_NAME, corrupt=1)
    said: list[str] = []
    done = download(REPO, folder=place, say=said.append)
    assert contents(done.folder) == needed(hub)
    assert any(f"{SHARDS[0]} has the hash" in text for text in said)


def test_bytes_that_stay_corrupt_are_an_error_and_get_no_name(hub: Hub, place: Path | None) -> None:
    hub.trouble(SHARDS[0], corrupt=2)
    with pytest.raises(DownloadError) as error:
        download(REPO, folder=place)
    assert SHARDS[0] in error.value.message
    assert etag(SHARDS[0], hub.files[SHARDS[0]]) in error.value.message
    assert "mirror" in error.value.hint
    with pytest.raises(InputError, match="unfinished"):
        resolve_model(place or REPO)
    assert contents(download(REPO, folder=place).folder) == needed(hub)


@pytest.mark.parametrize("resize", [-10, 10])
def test_wrong_sizes_are_an_error_with_the_size(hub: Hub, resize: int) -> None:
    hub.trouble(SHARDS[1], resize=resize)
    with pytest.raises(DownloadError, match="twice") as error:
        download(REPO)
    assert f"{len(hub.files[SHARDS[1]]):,}" in error.value.message


def test_a_partial_file_that_was_damaged_is_begun_again(hub: Hub, place: Path | None) -> None:
    hub.trouble(SHARDS[0], drops=[60_000] + [0] * 50)
    with pytest.raises(DownloadError):
        download(REPO, folder=place)
    kept = partial(hub, place, SHARDS[0])
    flip(kept)
    hub.troubles.clear()
    assert contents(download(REPO, folder=place).folder) == needed(hub)


def test_a_partial_file_that_is_too_long_is_begun_again(hub: Hub) -> None:
    hub.trouble(SHARDS[0], drops=[60_000] + [0] * 50)
    with pytest.raises(DownloadError):
        download(REPO)
    partial(hub, None, SHARDS[0]).write_bytes(b"\0" * (len(hub.files[SHARDS[0]]) + 1))
    hub.troubles.clear()
    assert contents(download(REPO).folder) == needed(hub)


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
@pytest.mark.parametrize("name", [SHARDS[2], "config.json", INDEX_NAME])
def test_a_finished_model_that_was_damaged_is_repaired(hub: Hub, place: Path | None, how: str, name: str) -> None:
    done = download(REPO, folder=place)
    path = place_of(hub, done, name)
    if how == "flipped":
        flip(path)
    elif how == "cut":
        os.truncate(path, 100)
    else:
        path.unlink()
    hub.forget()
    again = download(REPO, folder=place)
    assert contents(again.folder) == needed(hub)
    assert hub.sent == lengths(hub, {name})
    assert again.transferred == len(hub.files[name])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# ---- what cannot be had ----------------------------------------------------------------------------------------------


def refused(match: str, kind: type[InputError] = InputError, repo: str = REPO, **options: Any) -> InputError:
    """The error of a download that fails for what was given, or (DownloadError) for what happened."""
    with pytest.raises(InputError, match=match) as error:
        download(repo, **options)
    assert isinstance(error.value, DownloadError) is (kind is DownloadError)
    assert error.value.hint
    return error.value


def test_no_such_model_and_no_such_revision(hub: Hub) -> None:
    assert "HF_TOKEN" in refused("has no model someone/else", repo="someone/else").hint
    assert hub.url in refused("no revision 'v9'", revision="v9").hint
    refused("no name of a revision", revision="../../etc")
    refused("no name of a model", repo="some--one/..")


def test_gated_without_and_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.token = True, "hf_right"
    assert f"{hub.url}/{REPO}" in refused("gated, and no token is given").hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("gated, and the account of your token has no access")
    assert not hub.sent
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert contents(download(REPO).folder) == needed(hub)
    assert not hub.leaked, "a token is for the hub, not for where it keeps its files"


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Unset it" in refused("HF_HUB_OFFLINE is set").hint
    assert not hub.asked


def test_a_name_that_does_not_resolve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    assert "HF_ENDPOINT" in refused("the name 127.0.0.1 cannot be resolved", DownloadError).hint


def test_nobody_listens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    refused("no connection to 127.0.0.1", DownloadError)


@pytest.mark.parametrize("address", ["nonsense", "ftp://127.0.0.1", "http://[::1"])
def test_an_endpoint_that_is_no_address(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    assert "HF_ENDPOINT" in refused("is no address of a hub").hint


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[]", b"{}", b'{"sha": "main", "siblings": []}', b"null"])
def test_a_server_that_is_no_hub(hub: Hub, body: bytes) -> None:
    hub.listing = body
    refused("does not answer like a hub|names no commit", DownloadError)


def test_silence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "LISTING_TIMEOUT", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        refused("does not answer", DownloadError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rfilename": "encoding/../../../evil"}, "cannot be written"),
        ({"rfilename": "encoding//etc/passwd"}, "cannot be written"),
        ({"blobId": "../../evil"}, "without a size and a hash"),
        ({"blobId": None}, "without a size and a hash"),
    ],
)
def test_listings_that_would_write_elsewhere(hub: Hub, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bad = [{**entry, **change} if entry["rfilename"] == "encoding/encoding_dsv4.py" else entry
           for entry in hub.siblings()]  # fmt: skip
    hub.listing = json.dumps({"id": REPO, "sha": COMMIT, "siblings": bad}).encode()
    refused(message, DownloadError)
    assert not list(tmp_path.rglob("evil"))


def test_what_is_no_v4_model_is_refused_before_its_weights_come(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"model_type": "deepseek_v41"}).encode()
    with pytest.raises(ConfigError, match=r"config\.json of someone/small-v4"):
        download(REPO)
    assert set(hub.sent) == {"config.json"}
    del hub.files["config.json"]
    refused("no config.json")


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": {}}}'])
def test_an_index_that_cannot_be_read(hub: Hub, index: bytes) -> None:
    hub.files[INDEX_NAME] = index
    refused("or its index cannot be read")


def test_an_index_that_names_what_is_not_there(hub: Hub) -> None:
    del hub.files[SHARDS[1]]
    refused(f"lacks 1 of 3 files of weights: {SHARDS[1]}")


def test_without_a_tokenizer_it_is_said(hub: Hub) -> None:
    del hub.files["tokenizer.json"]
    said: list[str] = []
    download(REPO, say=said.append)
    assert any("no tokenizer.json" in text for text in said)


# ---- the disk --------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_no_room_is_said_with_both_numbers_before_anything_comes(
    hub: Hub, place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(lengths(hub).values())
    monkeypatch.setattr(machinery.shutil, "disk_usage", lambda folder: Usage(10**12, 0, 2048))
    error = refused("2.0 KiB free", folder=place)
    assert machinery.readable_bytes(size) in error.message
    assert machinery.readable_bytes(size - 2048) in error.hint
    assert set(hub.sent) == {"config.json", INDEX_NAME}
    monkeypatch.setattr(machinery.shutil, "disk_usage", lambda folder: Usage(10**12, 0, size))
    download(REPO, folder=place)
    monkeypatch.setattr(machinery.shutil, "disk_usage", lambda folder: Usage(10**12, 0, 0))
    assert download(REPO, folder=place).transferred == 0


def test_a_disk_that_fills_up_on_the_way(hub: Hub, place: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [100_000]
    opened = machinery.opened

    def small(path: Path) -> Any:
        handle = opened(path)

        class Small:
            def __getattr__(self, name: str) -> Any:
                return getattr(handle, name)

            def __enter__(self) -> Small:
                return self

            def __exit__(self, *error: object) -> None:
                handle.close()

            def write(self, data: bytes) -> int:
                room[0] -= len(data)
                if room[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return int(handle.write(data))

        return Small()

    monkeypatch.setattr(machinery, "opened", small)
    error = refused("the disk is full: .* still to come", DownloadError, folder=place)
    assert "goes on where it stopped" in error.hint
    hub.forget()
    room[0] = 10**9
    done = download(REPO, folder=place)
    assert contents(done.folder) == needed(hub)
    assert done.transferred <= done.bytes - 100_000 + 8 * CHUNK
    assert sum(hub.sent.values()) == done.transferred


def test_a_disk_that_fails_otherwise_names_the_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(machinery.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as error:
        download(REPO)
    assert str(error.value.filename).endswith(".incomplete")


def test_a_cache_on_a_disk_without_links(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", no_links)
    assert "--dir" in refused("takes no symbolic links").hint
    assert set(hub.sent) == {"config.json", INDEX_NAME}
    assert contents(download(REPO, folder=tmp_path / "own").folder) == needed(hub)


# ---- a folder of one's own -------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear")
    refused("is not empty: it holds diary.txt", folder=folder)
    assert contents(folder) == {"diary.txt": b"dear"}
    refused("is a file", folder=folder / "diary.txt")


@pytest.mark.parametrize("content", [b"other", "the same size"])
def test_a_file_that_no_download_wrote_is_not_written_over(hub: Hub, tmp_path: Path, content: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    mine = content if isinstance(content, bytes) else b"\0" * len(hub.files[SHARDS[0]])
    (folder / SHARDS[0]).write_bytes(mine)
    refused("not of a download|nor of a download", folder=folder)
    assert (folder / SHARDS[0]).read_bytes() == mine


def test_files_that_another_tool_brought_are_checked_and_taken(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "README.md").write_bytes(hub.files["README.md"])
    for name in SHARDS[:2]:
        (folder / name).write_bytes(hub.files[name])
    done = download(REPO, folder=folder)
    assert set(hub.sent) == NEEDED - set(SHARDS[:2])
    assert needed(hub).items() <= contents(done.folder).items()


def test_a_folder_of_another_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(REPO, folder=tmp_path / "own")
    monkeypatch.setattr("support.hub_server.REPO", "someone/large-v4")
    refused(f"holds a download of {REPO}", repo="someone/large-v4", folder=tmp_path / "own")


def test_a_folder_moves_on_to_another_commit(hub: Hub, tmp_path: Path) -> None:
    download(REPO, folder=tmp_path / "own")
    hub.commit, hub.files["LICENSE"] = "e" * 40, b"other terms"
    hub.forget()
    done = download(REPO, folder=tmp_path / "own")
    assert (done.commit, contents(done.folder)) == (hub.commit, needed(hub))
    assert hub.sent == lengths(hub, {"LICENSE"})


def test_a_damaged_mark_is_an_error_with_a_way_out(hub: Hub, tmp_path: Path) -> None:
    download(REPO, folder=tmp_path / "own")
    (tmp_path / "own" / DOWNLOAD_MARK / "state.json").write_text("{")
    for attempt in (lambda: resolve_model(tmp_path / "own"), lambda: download(REPO, folder=tmp_path / "own")):
        with pytest.raises(InputError, match="is damaged") as error:
            attempt()
        assert "Remove" in error.value.hint


def test_a_copied_half_is_told_to_be_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    done = download(REPO, folder=tmp_path / "own")
    (done.folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards") as error:
        Checkpoint.open(resolve_model(done.folder))
    assert "run dsv4 download again" in error.value.hint


def test_settings_of_the_hub_are_given_back(hub: Hub) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    before = constants.DOWNLOAD_CHUNK_SIZE, hub_logging.get_verbosity()
    with hub_client.hub_settings():
        assert constants.DOWNLOAD_CHUNK_SIZE == CHUNK
        assert hub_logging.get_verbosity() == logging.ERROR
    download(REPO)
    assert (constants.DOWNLOAD_CHUNK_SIZE, hub_logging.get_verbosity()) == before
