"""What cannot be downloaded, disks that are full or fail, and folders that hold something else."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="what huggingface-hub 2 transfers with: pip install -e .")

from dsv4_engine import download as machinery
from dsv4_engine import hub as hub_client
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.download import download
from dsv4_engine.errors import CheckpointError, ConfigError, DownloadError, InputError
from dsv4_engine.locate import DOWNLOAD_MARK, INDEX_NAME, resolve_model
from support.download_case import CHUNK, NEEDED, SHARDS, contents, lengths, needed
from support.hub_server import COMMIT, REPO, Hub

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
