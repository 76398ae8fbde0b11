"""Downloads from a server that speaks the hub's protocol: what is taken, and lines and bytes that break.

Every byte that comes twice without need is a failure: the server counts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="what huggingface-hub 2 transfers with: pip install -e .")

from dsv4_engine import hub as hub_client
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.download import download
from dsv4_engine.errors import DownloadError, InputError
from dsv4_engine.locate import INDEX_NAME, resolve_model
from support.download_case import CHUNK, NEEDED, SHARDS, contents, lengths, needed, place_of
from support.hub_server import COMMIT, REPO, Hub, etag

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
