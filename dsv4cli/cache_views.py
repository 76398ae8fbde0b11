"""What `dsv4 cache` shows: prompts out of segments, and the tables for people."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dsv4cli.output import count, file_size, note, table

if TYPE_CHECKING:
    from dsv4_engine.prefix_cache import PrefixStore


def prompts(store: PrefixStore) -> list[dict[str, Any]]:
    """The ends of chains, with sums over each chain."""
    entries = sorted(store.entries(), key=lambda entry: entry.start)
    followers: dict[bytes, int] = {}
    for entry in entries:
        followers[entry.parent] = followers.get(entry.parent, 0) + 1
    whole: dict[bytes, int] = {}
    own: dict[bytes, int] = {}
    for entry in entries:
        whole[entry.key] = entry.size + whole.get(entry.parent, 0)
        own[entry.key] = entry.size + (own.get(entry.parent, 0) if followers[entry.parent] == 1 else 0)
    return [
        {
            "key": entry.key.hex(),
            "model": entry.origin.name or entry.origin.model[:12],
            "format": entry.origin.row_format,
            "tokens": entry.end,
            "bytes": whole[entry.key],
            "own_bytes": own[entry.key],
            "uses": entry.hits,
            "last_used": round(entry.used),
        }
        for entry in sorted(entries, key=lambda entry: -entry.used)
        if entry.key not in followers
    ]


def show_prompts(found: list[dict[str, Any]]) -> None:
    """The table of `ls`."""
    table("", ["prompt", "model", "tokens", "size", "own", "uses", "last used"], [
        [prompt["key"][:12], prompt["model"], count(prompt["tokens"]), file_size(prompt["bytes"]),
         file_size(prompt["own_bytes"]), count(prompt["uses"]), _when(prompt["last_used"])]
        for prompt in found
    ])  # fmt: skip


def show_stats(found: dict[str, Any]) -> None:
    held = "" if found["writable"] else ", only read"
    amplification = found["write_amplification"]
    rows = [
        ["folder", found["folder"] + held],
        ["kept", f"{file_size(found['size'])}, {_many(found['tokens'], 'token')} "
                 f"in {_many(found['segments'], 'segment')}"],
        ["budget", f"{file_size(found['budget'])}; {file_size(found['free'])} of the disk are free"],
        *([kind, f"{file_size(found['sizes'][kind])} in {_many(number, 'object')}"]
          for kind, number in found["objects"].items()),
        ["written", file_size(found["written"])
         + (f", {amplification:.2f} times what was kept" if amplification else "")],
        ["removed", file_size(found["removed"])],
    ]  # fmt: skip
    if found["quarantined_files"]:
        rows.append(["set aside", f"{count(found['quarantined_files'])} damaged, {file_size(found['quarantined'])}"])
    if found["staged"]:
        rows.append(["being written", file_size(found["staged"])])
    if found["other_versions"]:
        rows.append(["other versions", file_size(found["other_versions"])])
    table("", ["", ""], rows)
    if found["shares"]:
        table("\nModels", ["model", "tokens", "size", "a token", "format"], [
            [share["origin"]["name"] or share["origin"]["model"][:12], count(share["tokens"]), file_size(share["size"]),
             file_size(share["size"] / share["tokens"]) if share["tokens"] else "-", share["origin"]["row_format"]]
            for share in found["shares"]
        ])  # fmt: skip


def show_verified(found: dict[str, Any]) -> None:
    rows = [["sound", f"{_many(found['objects'], 'object')}, {file_size(found['size'])}"]]
    rows += [["damaged", f"{name[:12]}….{name.rpartition('.')[2]}: {why}"] for name, why in found["damaged"].items()]
    rows += [["index", problem] for problem in found["index"]]
    if found["vanished"]:
        rows.append(["vanished", f"{_many(found['vanished'], 'object')} that the index knew"])
    if found["adopted"]:
        rows.append(["found", f"{_many(found['adopted'], 'object')} that the index did not know"])
    if found["unreachable"]:
        rows.append(["behind a gap", f"{_many(found['unreachable'], 'segment')}, of use once that is computed again"])
    again = found["replay"]
    if again is not None:
        rows.append(["computed again", f"{_many(again['checked'], 'segment')} with {again['model']}, "
                                       f"{count(len(again['different']))} differ"])  # fmt: skip
        rows += [["differs", key[:12]] for key in again["different"]]
        if again["skipped"]:
            rows.append(["left out", f"{_many(again['skipped'], 'segment')} of other models or formats"])
    table("", ["", ""], rows)
    if again is not None and not again["checked"]:
        note("nothing could be computed again: no segment is of this model in this format")


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
